"""From the text of a PTX file to the instructions of one kernel.

PTX ISA, "Syntax" and "State Spaces, Types, and Variables".
"""

import re
from bisect import bisect_right
from dataclasses import dataclass, field

from kernels.emulator import EmulatorError

TARGETS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_90a")
WIDTHS = {
    "pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16,
    "b32": 32, "u32": 32, "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32, "b64": 64, "u64": 64,
    "s64": 64, "f64": 64,
}  # fmt: skip
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{;]*)\{", re.DOTALL)
_PARAMETER = re.compile(
    r"\.param\s+\.(\w+)\s+(?:\.[a-z][\w.]*\s+(?:\d+\s+)?)*([\w$]+)(\[\d+\])?\s*$"
)
_ALIGNED_PARAMETER = re.compile(r"\.param\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d+)\]\s*$")
_LABEL = re.compile(r"([$\w%]+)\s*:(?!:)")
_LINE_DIRECTIVE = re.compile(r"\.(?:loc|file)\b[^\n]*")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_GUARD = re.compile(r"@(!?)([%\w]+)\s+(.*)", re.DOTALL)
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.b8\s+([\w$]+)\[(\d*)\]")


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``@!%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1];``."""

    name: str  # ld
    modifiers: tuple[str, ...]  # global, v2, b32
    operands: tuple[str, ...]  # {%r1, %r2} and [%rd1]
    guard: str | None  # %p1
    negated: bool
    line: int
    text: str


@dataclass
class Kernel:
    """A parsed kernel. Labels and branch tables are indices of instructions."""

    name: str
    target: str
    threads: int
    parameters: list[tuple[str, int]]  # name and width in bits; 0 of an opaque block of bytes
    widths: dict[str, int] = field(default_factory=dict)  # of registers; of "%r<9>" under "%r"
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    shared: dict[str, int | None] = field(default_factory=dict)  # sizes; None: given at launch

    def width(self, register: str) -> int | None:
        """Return the bits of a declared register."""
        found = self.widths.get(register)
        return self.widths.get(register.rstrip("0123456789")) if found is None else found


def parse(text: str, name: str | None = None) -> Kernel:
    """Return the kernel of this name, or the first. Raises EmulatorError for what is not PTX."""
    text = _COMMENT.sub(lambda comment: re.sub(r"[^\n]", " ", comment[0]), text)
    target = re.search(r"^\s*\.target\s+([\w, ]+)", text, re.MULTILINE)
    if target is None:
        raise EmulatorError("line 1: no .target; this is no PTX file")
    if target[1].split(",")[0].strip() not in TARGETS:
        line = text.count("\n", 0, target.start(1)) + 1
        raise EmulatorError(
            f"line {line}: target {target[1].strip()} is not emulated; compile for one of "
            f"{', '.join(TARGETS)}"
        )
    entries = [entry for entry in _ENTRY.finditer(text) if name in (None, entry[1])]
    if not entries:
        raise EmulatorError(f"line 1: no kernel {name or ''} (.entry) in this file")
    entry = entries[0]
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", entry[3])
    if threads is None:
        raise EmulatorError(f"{entry[1]}: no .reqntid says how many threads it has")
    kernel = Kernel(
        entry[1], target[1].split(",")[0].strip(), int(threads[1]), _parameters(entry[2])
    )
    for _, symbol, size in _SHARED.findall(text):
        kernel.shared[symbol] = int(size) if size else None
    _Body(kernel, text, entry.end()).read()
    return kernel


def _parameters(text: str) -> list[tuple[str, int]]:
    found = []
    for declaration in filter(str.strip, text.split(",")):
        if block := _ALIGNED_PARAMETER.search(declaration):
            found.append((block[1], 0))
        elif scalar := _PARAMETER.search(declaration):
            found.append((scalar[2], 0 if scalar[3] else WIDTHS[scalar[1]]))
        else:
            raise EmulatorError(f"parameter not understood: {declaration.strip()}")
    return found


class _Body:
    """Reads the statements between the braces of a kernel.

    Names declared in an inner scope get its number: ``complete`` becomes ``complete@3``.
    """

    def __init__(self, kernel: Kernel, text: str, start: int) -> None:
        self.kernel, self.text, self.at = kernel, text, start
        self.line_starts = [0, *(m.end() for m in re.finditer("\n", text))]
        self.scopes: list[int] = []
        self.declared: set[str] = set()
        self.opened = 0
        self.unresolved: list[tuple[int, tuple[int, ...]]] = []

    def read(self) -> None:
        """Fill the kernel with its instructions, registers and labels."""
        while True:
            self._skip_blanks()
            character = self.text[self.at : self.at + 1]
            if not character:
                raise EmulatorError(f"line {self._line()}: the file ends within {self.kernel.name}")
            if character == "{":
                self.opened += 1
                self.scopes.append(self.opened)
                self.at += 1
            elif character == "}":
                self.at += 1
                if not self.scopes:
                    break
                self.scopes.pop()
            elif directive := _LINE_DIRECTIVE.match(self.text, self.at):
                self.at = directive.end()
            elif label := _LABEL.match(self.text, self.at):
                self._label(label)
            else:
                self._statement()
        self._resolve_names()

    def _skip_blanks(self) -> None:
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1

    def _line(self) -> int:
        return bisect_right(self.line_starts, self.at)

    def _label(self, label: re.Match[str]) -> None:
        self.at = label.end()
        table = re.compile(r"\s*\.branchtargets\s+([^;]*);").match(self.text, self.at)
        if table:
            self.kernel.tables[label[1]] = [name.strip() for name in table[1].split(",")]
            self.at = table.end()
            return
        self.kernel.labels[self._declare(label[1])] = len(self.kernel.instructions)

    def _declare(self, name: str) -> str:
        name = f"{name}@{self.scopes[-1]}" if self.scopes else name
        self.declared.add(name)
        return name

    def _statement(self) -> None:
        line = self._line()
        end = self.text.find(";", self.at)
        if end < 0:
            raise EmulatorError(f"line {line}: a statement without its semicolon")
        statement = " ".join(self.text[self.at : end].split())
        self.at = end + 1
        if registers := _REGISTERS.match(statement):
            self._registers(registers, line)
        elif statement.startswith(".pragma"):
            pass
        elif statement.startswith("."):
            raise EmulatorError(f"line {line}: directive not understood: {statement}")
        elif statement:
            self._instruction(statement, line)

    def _registers(self, declaration: re.Match[str], line: int) -> None:
        if declaration[1] not in WIDTHS:
            raise EmulatorError(f"line {line}: registers of type .{declaration[1]} are not known")
        for name in declaration[2].split(","):
            name, numbered, _ = name.strip().partition("<")
            self.kernel.widths[name if numbered else self._declare(name)] = WIDTHS[declaration[1]]

    def _instruction(self, statement: str, line: int) -> None:
        guard, negated, rest = None, False, statement
        if guarded := _GUARD.match(statement):
            negated, guard, rest = bool(guarded[1]), guarded[2], guarded[3]
        opcode, _, operands = rest.partition(" ")
        name, *modifiers = opcode.split(".")
        self.unresolved.append((len(self.kernel.instructions), tuple(self.scopes)))
        self.kernel.instructions.append(
            Instruction(
                name, tuple(modifiers), split_operands(operands), guard, negated, line, statement
            )
        )

    def _resolve_names(self) -> None:
        """Give names of inner scopes their numbers, now that all labels are known."""
        for index, scopes in self.unresolved:
            if not scopes:
                continue
            ins = self.kernel.instructions[index]

            def rename(match: re.Match[str], scopes: tuple[int, ...] = scopes) -> str:
                inner = (f"{match[0]}@{scope}" for scope in reversed(scopes))
                return next((name for name in inner if name in self.declared), match[0])

            self.kernel.instructions[index] = Instruction(
                ins.name,
                ins.modifiers,
                tuple(re.sub(r"[%$A-Za-z_][\w$]*", rename, operand) for operand in ins.operands),
                re.sub(r".+", rename, ins.guard) if ins.guard else None,
                ins.negated,
                ins.line,
                ins.text,
            )


def split_operands(text: str) -> tuple[str, ...]:
    """Split at commas outside of braces, brackets and parentheses."""
    parts, depth, part = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += character
    if part.strip():
        parts.append(part.strip())
    return tuple(parts)
