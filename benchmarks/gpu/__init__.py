"""All checks and measurements on a GPU, by one command, in parts of bounded time.

``case.py`` defines a case, ``parts.py`` lists them, ``run.py`` runs them. The code of a case
(``first_light.py``, ``suite.py``, ``speed.py``, ``host_time.py``, ``training.py``, ``offload.py``)
runs in a process of its own, ``child.py``, and appends its findings to DIR/results.jsonl
(``store.py``). ``report.py`` makes tables of them.
"""
