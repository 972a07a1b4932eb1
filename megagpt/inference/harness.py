"""lm-evaluation-harness on our own model: its tasks, prompts and metrics, our forward.

The package `lm_eval` is optional. Requests are scored as its own runner (`--model hf`) scores them
on the exported model: the same tokens, the same cut to the context, the same empty prompt. Replicas
take turns with the requests; every rank computes the metrics, so the harness needs no groups.
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from datasets.exceptions import DatasetsError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megagpt.data.tokenizer import Tokenizer
from megagpt.inference.generate import Sampler, allowed_tokens, continuation
from megagpt.inference.placed_model import PlacedModel, Score
from megagpt.inference.text_windows import Window, padded
from megagpt.model import IGNORED
from megagpt.utils import UserError, did_you_mean

Item = TypeVar("Item")
Tokens = list[int]
BOOTSTRAP_ITERATIONS = 100_000  # for standard errors, as in the harness
MOST_NEW_TOKENS = 256  # of a task that does not say, as in the harness
DATA_ERRORS = (OSError, DatasetsError, ValueError)


class HarnessModel(TemplateLM):
    """The model as the harness asks it; ``batch_size`` is the number of rows in a forward."""

    def __init__(self, model: PlacedModel, tokenizer: Tokenizer, batch_size: int) -> None:
        super().__init__()
        self.model = model
        self.text = tokenizer
        self.batch_size = batch_size
        self.max_length = model.config.megagpt.model.sequence_length
        self.allowed = allowed_tokens(tokenizer)

    @property
    def speaks_first(self) -> bool:
        """Whether this rank's results are shown."""
        return self.model.mesh is None or self.model.mesh.rank == 0

    @property
    def eot_token_id(self) -> int:
        return self.text.end_of_document

    @property
    def prefix_token_id(self) -> int:
        """The token before an empty prompt."""
        return self.text.prefix

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> Tokens:
        start = () if add_special_tokens is False else self.text.start_of_document
        return [*start, *self.text.encode(string)]

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=not self.speaks_first)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Tokens, Tokens]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows = [self._row(context, wanted) for _, context, wanted in requests]
        return [(score.log_probability, score.greedy) for score in self._scores(rows)]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        rows: list[Window] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            found = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, wanted in map(make_disjoint_window, found):
                rows.append(self._row(context, wanted))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, score in zip(owners, self._scores(rows), strict=True):
            sums[owner] += score.log_probability
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        for _, settings in (request.args for request in requests):  # before anything is generated
            self._require_room(normalize_gen_kwargs(settings, MOST_NEW_TOKENS)["max_gen_toks"])
        own = [self._generated(*request.args) for request in self.model.share(iter(requests))]
        return self.model.gather(own)

    def _require_room(self, most: int) -> None:
        """Raise UserError if the model's context has no room for a prompt and ``most`` tokens."""
        if most >= self.max_length:
            raise UserError(
                f"--tasks: a task generates {most} tokens, but megagpt.model.sequence_length is "
                f"{self.max_length} and the prompt needs room; set max_gen_toks in its "
                f"generation_kwargs below that"
            )

    def _row(self, context: Tokens, wanted: Tokens) -> Window:
        """Return what the model reads, cut on the left to its context, and what it has to say."""
        tokens = (context + wanted)[-(self.max_length + 1) :]
        targets = np.array(tokens[1:], np.int64)
        targets[: max(len(targets) - len(wanted), 0)] = IGNORED
        return np.array(tokens[:-1], np.int64), targets

    def _scores(self, rows: Sequence[Window]) -> list[Score]:
        """Return each row's score, in order; the longest rows are read first, with their like.

        Rows of the same tokens are read once: answers of one token to the same question.
        """
        alike: dict[bytes, list[int]] = defaultdict(list)
        for number, (tokens, _) in enumerate(rows):
            alike[tokens.tobytes()].append(number)
        groups = sorted(alike.values(), key=lambda group: -len(rows[group[0]][0]))
        own = []
        for chosen in self.model.share(_chunks(groups, self.batch_size)):
            numbers = [number for group in chosen for number in group]
            places = [place for place, group in enumerate(chosen) for _ in group]
            tokens = padded([rows[group[0]] for group in chosen]).tokens
            targets = padded([rows[number] for number in numbers]).targets
            scores = self.model.scores(tokens, targets, np.array(places))
            own.append(list(zip(numbers, scores, strict=False)))  # no scores on other stages
        found: dict[int, Score] = {}
        for batch in self.model.gather(own):
            found |= dict(batch)
        return [found[row] for row in range(len(rows))]

    def _generated(self, context: str, settings: dict[str, Any]) -> str:
        """Return the continuation of a context up to a stop sequence, as transformers gives it."""
        wanted = normalize_gen_kwargs(settings, MOST_NEW_TOKENS)
        end = self.text.decode([self.eot_token_id])
        stops = [s for s in handle_stop_sequences(list(wanted["until"]), eos=end) if s]
        most = wanted["max_gen_toks"]
        sampler = Sampler(
            self.allowed,
            temperature=wanted["temperature"] if wanted["do_sample"] else 0.0,
            top_k=wanted.get("top_k"),
            top_p=wanted.get("top_p", 1.0),
            seed=0,
        )
        tokens: Tokens = []
        for token in continuation(
            self.model.logits,
            self.tok_encode(context)[-(self.max_length - most) :] or [self.prefix_token_id],
            sampler,
            sequence_length=self.max_length,
            reread_after=self.model.config.megagpt.model.reread_after,
            end_tokens=(self.eot_token_id,),
            limit=most,
        ):
            tokens.append(token)
            text = self.text.decode(tokens)
            if any(stop in text for stop in stops):
                break
        return postprocess_generated_text(self.text.decode(tokens), stops, None)


class Tasks(TaskManager):
    """The harness's tasks; what keeps one from running is one line."""

    def load(self, task_list: Any) -> Any:
        given = f"--tasks {' '.join(map(str, task_list))}"
        try:
            loaded = super().load(task_list)
        except ImportError as error:
            raise UserError(
                f"{given}: a task needs another package ({error}); install it with python -m pip"
            ) from error
        except DATA_ERRORS as error:
            said = " ".join(str(error).split())
            raise UserError(
                f"{given}: the data cannot be loaded ({said}); load them once where there is a "
                f"network, into the cache of Hugging Face datasets (HF_HOME), or name local files "
                f"in the task's YAML"
            ) from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError(
                    f"{given}: {name} runs code that the model writes, which this command does "
                    f"not; run it with the harness, in a sandbox, on the exported model"
                )
        return loaded


def run_tasks(
    model: HarnessModel,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Return the harness's results, its samples among them, for names of tasks or their YAML files.

    ``include_path`` is a directory of more tasks. Every rank that shares the model must call it
    and gets all results. Raise UserError for an unknown task and for data that are not there.
    """
    # To find the harness's own tasks it reads some ten thousand files.
    own = [task for task in tasks if Path(task).is_file() and not _is_group(Path(task))]
    known = Tasks(
        include_path=None if include_path is None else str(include_path),
        include_defaults=len(own) < len(tasks),
    )
    names = [name for task in tasks for name in _names(task, known)]
    # As simple_evaluate does, which would also ask pip for every package on this machine.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    loaded = known.load(names)
    for task in loaded["tasks"].values():
        of_task = task.get_config("num_fewshot")
        if of_task != 0:  # a task that says 0 has no examples
            chosen = of_task if num_fewshot is None else num_fewshot
            task.set_config(key="num_fewshot", value=chosen or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    iterations = BOOTSTRAP_ITERATIONS if model.speaks_first else 0
    return evaluate(model, loaded, limit=limit, bootstrap_iters=iterations)


def _chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _is_group(task: Path) -> bool:
    """Return whether a YAML file names other tasks."""
    return any(line.startswith("group:") for line in task.read_text().splitlines())


def _names(task: str, known: TaskManager) -> list[str]:
    """Return the tasks that a name, a pattern or a YAML file means."""
    if Path(task).is_file():
        return [task]
    if names := known.match_tasks([task]):
        return names
    raise UserError(
        f"--tasks {task}: unknown task{did_you_mean(task, known.all_tasks)}; name one of the "
        f"harness's, the YAML file of one, or the directory of your own with --include_path"
    )


def scores_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the metrics of each task and group by name."""
    return {
        task: {
            key.removesuffix(",none"): value
            for key, value in found.items()
            if isinstance(value, int | float)
        }
        for task, found in (results["results"] | results.get("groups", {})).items()
    }
