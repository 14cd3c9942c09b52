"""Runs PTX that Triton compiled for compute capability 7.5, on the CPU, in numpy.

All threads of a program advance together, one instruction at a time, so only branches that are
the same for a whole program can be taken; Triton makes no others. The tensor-core instruction,
``mma.m16n8k8``, and ``ldmatrix`` place their fragments as the PTX manual draws them, which is what
a wrong lowering gets wrong. Two kinds of mistakes that a GPU hides are errors here: an access
beyond every tensor, and threads of different warps using the same shared memory without a barrier
between them. Shared memory and registers start as NaN.

It knows the instructions that our kernels compile to, and names the first one that it does not.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

WARP = 32
DTYPES: dict[str, Any] = {
    "s16": np.int16, "u16": np.uint16, "b16": np.uint16, "f16": np.float16,
    "s32": np.int32, "u32": np.uint32, "b32": np.uint32, "f32": np.float32,
    "s64": np.int64, "u64": np.uint64, "b64": np.uint64, "f64": np.float64,
    "f16x2": np.float16, "pred": np.bool_,
}  # fmt: skip
RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
COMPARE: dict[str, Callable[..., Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip
FLOAT: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.fmax,
    "min": np.fmin, "neg": np.negative, "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt,
    "rcp": np.reciprocal, "abs": np.abs,
}  # fmt: skip
INTEGER: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum,
    "neg": np.negative, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "not": np.invert, "shl": np.left_shift, "shr": np.right_shift,
}  # fmt: skip


class Instruction(NamedTuple):
    guard: str | None
    negated: bool
    opcode: tuple[str, ...]
    operands: tuple[Any, ...]  # a vector operand is a tuple itself
    text: str


class Segment(NamedTuple):
    """Memory that a kernel may use: bytes, and the address of the first."""

    address: int
    data: Array


class Kernel:
    """A compiled kernel, ready to be run."""

    def __init__(self, ptx: str) -> None:
        header, body = re.split(r"\n\{\n", ptx.split(".visible .entry", 1)[1], maxsplit=1)
        self.parameters = re.findall(r"\.param \.\S+.*?(\w+_param_\d+)", header)
        threads = re.search(r"\.reqntid (\d+)", header)
        assert threads is not None
        self.threads = int(threads[1])
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        body = re.sub(r"//.*", "", body.split("\n}", 1)[0])
        for line in body.replace(";", "\n").split("\n"):
            statement = line.strip()
            if label := re.fullmatch(r"(\$\w+):", statement):
                self.labels[label[1]] = len(self.instructions)
            elif statement and not statement.startswith((".", "{", "}")):
                self.instructions.append(parse(statement))

    def run(
        self,
        grid: Sequence[int],
        arguments: Sequence[int | float],
        segments: Sequence[Segment],
        shared_bytes: int,
    ) -> Counter[str]:
        """Runs every program of the grid in turn; returns how often each opcode ran."""
        counts: Counter[str] = Counter()
        size = (*grid, 1, 1)[:3]
        values = dict(zip(self.parameters, arguments, strict=False))
        for index in np.ndindex(*size[::-1]):
            program = Program(self, index[::-1], size, values, segments, shared_bytes)
            with np.errstate(all="ignore"):
                program.run()
            counts += program.counts
            counts["inexact copies"] += program.shared.inexact_copies
        return counts


def parse(statement: str) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?(\S+)\s*(.*)", statement, re.DOTALL)
    assert match is not None, statement
    operands = []
    for operand in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", match[4]):
        if operand.startswith("{"):
            operands.append(tuple(re.findall(r"[^,\s{}]+", operand)))
        elif operand.startswith("["):
            inside = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
            assert inside is not None, statement
            operands.append((inside[1], int(inside[2] or 0)))
        else:
            operands.append(operand.split("|")[0])
    opcode = match[3].replace("::cta", "")  # of shared memory, which is what is meant without it
    return Instruction(
        match[2], match[1] == "!", tuple(opcode.split(".")), tuple(operands), statement
    )


class SharedMemory:
    """Bytes, and for each the last warps that wrote and read it since the last barrier."""

    def __init__(self, size: int) -> None:
        self.data = np.full(size, 0xFF, np.uint8)
        self.inexact_copies = 0
        self.barrier()

    def barrier(self) -> None:
        self.writer = np.full(len(self.data), -1, np.int16)
        self.reader = np.full(len(self.data), -1, np.int16)  # -2: several warps

    def load(self, places: Array, warps: Array) -> Array:
        writer = self.writer[places]
        if ((writer >= 0) & (writer != warps[:, None])).any():
            raise RuntimeError("a warp reads what another has written without a barrier")
        reader = self.reader[places]
        self.reader[places] = np.where(
            (reader == -1) | (reader == warps[:, None]), warps[:, None], -2
        )
        return self.data[places]

    def store(self, places: Array, values: Array, warps: Array) -> None:
        reader, writer = self.reader[places], self.writer[places]
        if ((reader != -1) & (reader != warps[:, None])).any():
            raise RuntimeError("a warp writes what another has read without a barrier")
        # Warps that hold copies of the same values may all write them.
        others = (writer >= 0) & (writer != warps[:, None])
        if (others & (self.data[places] != values)).any():
            raise RuntimeError("two warps write different values to the same place")
        self.data[places] = values
        self.writer[places] = warps[:, None]
        if (self.data[places] != values).any():
            self._check_copies(self.data[places], values)

    def _check_copies(self, kept: Array, values: Array) -> None:
        """Threads that hold copies of a sum may have added it up in different orders."""
        if values.shape[1] % 4 or not np.allclose(
            kept.view(np.float32), values.view(np.float32), rtol=1e-5, atol=1e-5
        ):
            raise RuntimeError("two threads write different values to the same place at once")
        self.inexact_copies += 1


class Program:
    """One program (thread block) while it runs. Registers hold raw bits, a value per thread."""

    def __init__(
        self,
        kernel: Kernel,
        index: Sequence[int],
        size: Sequence[int],
        parameters: dict[str, int | float],
        segments: Sequence[Segment],
        shared_bytes: int,
    ) -> None:
        self.kernel, self.parameters, self.segments = kernel, parameters, segments
        self.shared = SharedMemory(max(shared_bytes, 16))
        self.counts: Counter[str] = Counter()
        thread = np.arange(kernel.threads, dtype=np.uint32)
        self.warp, self.lane = (thread // WARP).astype(np.int16), thread % WARP
        self.registers: dict[str, Array] = {"%tid.x": thread, "global_smem": thread * 0}
        for axis, i, n in zip("xyz", index, size, strict=True):
            self.registers[f"%ctaid.{axis}"] = np.full_like(thread, i)
            self.registers[f"%nctaid.{axis}"] = np.full_like(thread, n)

    def run(self) -> None:
        at = 0
        while at < len(self.kernel.instructions):
            instruction = self.kernel.instructions[at]
            at += 1
            root = instruction.opcode[0]
            self.counts[".".join(instruction.opcode)] += 1
            active = None
            if instruction.guard is not None:
                active = self.registers[instruction.guard] ^ instruction.negated
            if root == "ret" and active is None:
                return
            if root == "bra":
                taken = True if active is None else active.any()
                if taken and active is not None and not active.all():
                    raise NotImplementedError(f"threads part ways: {instruction.text}")
                if taken:
                    at = self.kernel.labels[instruction.operands[0]]
                continue
            try:
                method = getattr(self, f"_{root}", self._arithmetic)
                method(instruction.opcode, instruction.operands, active)
            except (KeyError, AttributeError, AssertionError, ValueError) as error:
                raise NotImplementedError(f"unknown instruction: {instruction.text}") from error

    # --- registers ---------------------------------------------------------------------------

    def get(self, operand: str, kind: str) -> Array:
        dtype = np.dtype(DTYPES[kind])
        if (value := self.registers.get(operand)) is None:
            key = f"{operand} {kind}"
            if (value := self.registers.get(key)) is None:
                value = self.registers[key] = self._constant(operand, dtype)
        if dtype == np.bool_ or value.dtype == np.bool_:
            return value.astype(dtype)
        return value.view(dtype)

    def _constant(self, operand: str, dtype: Any) -> Array:
        if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
            bits = int(match[1], 16)
        else:
            bits = int(operand, 0)
        size = 8 * (4 if dtype == np.bool_ else dtype.itemsize)
        raw = RAW[size // 8](bits & ((1 << size) - 1))
        return np.full(self.kernel.threads, raw)

    def put(self, register: str, value: Array, active: Array | None = None) -> None:
        raw = value if value.dtype == np.bool_ else value.view(RAW[value.dtype.itemsize])
        if active is not None:
            old = self.registers.get(register)
            if old is None:
                old = np.full(raw.shape, -1).astype(raw.dtype)
            raw = np.where(active, raw, old)
        self.registers[register] = raw

    # --- memory ------------------------------------------------------------------------------

    def _places(self, operand: tuple[str, int], space: str, size: int, active: Array) -> Array:
        base, offset = operand
        address = self.get(base, "s64" if space == "global" else "s32").astype(np.int64)[active]
        address = address + offset
        if (address % size).any():
            raise RuntimeError(f"an address is not a multiple of {size}")
        return address[:, None] + np.arange(size)

    def _segment(self, places: Array) -> Segment:
        for segment in self.segments:
            if segment.address <= places.min() < segment.address + len(segment.data):
                if places.max() >= segment.address + len(segment.data):
                    break
                return segment
        raise RuntimeError("an access beyond every tensor")

    def _ld(self, opcode: tuple[str, ...], operands: Any, active: Array | None) -> None:
        kind, registers = opcode[-1], operands[0]
        if opcode[1] == "param":
            value = self.parameters[operands[1][0]]
            dtype = np.float32 if isinstance(value, float) else DTYPES[kind]
            loaded = np.full(self.kernel.threads, value).astype(dtype)
            if registers.startswith("%rd"):  # a narrow value is extended
                loaded = loaded.astype(DTYPES[kind[0] + "64"])
            self.put(registers, loaded, active)
            return
        registers = registers if isinstance(registers, tuple) else (registers,)
        dtype = np.dtype(DTYPES[kind])
        mask = np.ones(self.kernel.threads, np.bool_) if active is None else active
        loaded = np.zeros((self.kernel.threads, len(registers)), dtype)
        if mask.any():
            places = self._places(operands[1], opcode[1], dtype.itemsize * len(registers), mask)
            if opcode[1] == "shared":
                found = self.shared.load(places, self.warp[mask])
            else:
                segment = self._segment(places)
                found = segment.data[places - segment.address]
            loaded[mask] = found.view(dtype)
        for register, value in zip(registers, loaded.T, strict=True):
            self.put(register, np.ascontiguousarray(value), active)

    def _st(self, opcode: tuple[str, ...], operands: Any, active: Array | None) -> None:
        registers = operands[1] if isinstance(operands[1], tuple) else (operands[1],)
        mask = np.ones(self.kernel.threads, np.bool_) if active is None else active
        if not mask.any():
            return
        values = np.stack([self.get(r, opcode[-1])[mask] for r in registers], axis=1)
        data = np.ascontiguousarray(values).view(np.uint8)
        places = self._places(operands[0], opcode[1], data.shape[1], mask)
        if opcode[1] == "shared":
            self.shared.store(places, data, self.warp[mask])
        else:
            segment = self._segment(places)
            segment.data[places - segment.address] = data

    def _bar(self, opcode: tuple[str, ...], operands: Any, active: Array | None) -> None:
        if opcode[1] == "sync":  # that of a warp orders nothing between warps
            self.shared.barrier()

    # --- matrices ----------------------------------------------------------------------------

    def _ldmatrix(self, opcode: tuple[str, ...], operands: Any, active: Array | None) -> None:
        """Thread 8 i + r of a warp has the address of row r of its matrix i."""
        registers = operands[0] if isinstance(operands[0], tuple) else (operands[0],)
        n = len(registers)
        rows = self.lane < 8 * n
        places = self._places(operands[1], "shared", 16, rows)
        data = self.shared.load(places, self.warp[rows])
        matrices = data.view(np.uint16).reshape(-1, n, 8, 8)
        if "trans" in opcode:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        pairs = matrices.view(np.uint32).reshape(
            -1, n, WARP
        )  # thread 4 r + c: columns 2 c, 2 c + 1
        for i, register in enumerate(registers):
            self.put(register, pairs[:, i].reshape(-1))

    def _mma(self, opcode: tuple[str, ...], operands: Any, active: Array | None) -> None:
        """16 × 8 fp16 times 8 × 8 fp16, plus 16 × 8 fp32."""
        assert opcode[3:] == ("m16n8k8", "row", "col", "f32", "f16", "f16", "f32")

        def halves(register: str) -> Array:
            return self.get(register, "b32").view(np.float16).reshape(-1, 8, 8).astype(np.float64)

        def quarters(registers: Sequence[str]) -> Array:
            both = [self.get(r, "f32") for r in registers]
            return np.stack(both, axis=1).reshape(-1, 8, 8).astype(np.float64)

        result, a, b, c = operands
        b_transposed = halves(b[0] if isinstance(b, tuple) else b).swapaxes(1, 2)
        for i in (0, 1):  # rows 0 … 7, rows 8 … 15
            product = halves(a[i]) @ b_transposed + quarters(c[2 * i : 2 * i + 2])
            pairs = product.astype(np.float32).reshape(-1, 2)
            for register, value in zip(result[2 * i : 2 * i + 2], pairs.T, strict=True):
                self.put(register, np.ascontiguousarray(value))

    def _shfl(self, opcode: tuple[str, ...], operands: Any, active: Array | None) -> None:
        assert active is None
        other = self.get(operands[2], "b32")
        lane = self.lane ^ other if opcode[2] == "bfly" else other
        source = self.warp.astype(np.int64) * WARP + lane
        self.put(operands[0], self.get(operands[1], "b32")[source])

    # --- arithmetic --------------------------------------------------------------------------

    def _mov(self, opcode: tuple[str, ...], operands: Any, active: Array | None) -> None:
        target, source = operands
        kind = opcode[-1]
        if isinstance(target, tuple):
            parts = self.get(source, kind).view(RAW[int(kind[1:]) // 16]).reshape(-1, len(target))
            for register, part in zip(target, parts.T, strict=True):
                if register != "_":
                    self.put(register, np.ascontiguousarray(part), active)
        elif isinstance(source, tuple):
            half = f"b{int(kind[1:]) // 2}"
            both = np.stack([self.get(s, half) for s in source], axis=1)
            self.put(target, both.view(DTYPES[kind]).reshape(-1), active)
        else:
            self.put(target, self.get(source, kind), active)

    def _cvt(self, opcode: tuple[str, ...], operands: Any, active: Array | None) -> None:
        value = self.get(operands[1], opcode[-1])
        self.put(operands[0], value.astype(DTYPES[opcode[-2]]), active)

    def _setp(self, opcode: tuple[str, ...], operands: Any, active: Array | None) -> None:
        assert len(opcode) == 3
        a, b = (self.get(o, opcode[-1]) for o in operands[1:])
        self.put(operands[0], COMPARE[opcode[1]](a, b), active)

    def _selp(self, opcode: tuple[str, ...], operands: Any, active: Array | None) -> None:
        a, b = (self.get(o, opcode[-1]) for o in operands[1:3])
        self.put(operands[0], np.where(self.registers[operands[3]], a, b), active)

    def _bfe(self, opcode: tuple[str, ...], operands: Any, active: Array | None) -> None:
        """Bits ``start`` … ``start + length - 1``, the last one being the sign of an s32."""
        value, start, length = (self.get(o, "u32").astype(np.int64) for o in operands[1:])
        bits = (value >> start) & ((1 << length) - 1)
        if opcode[-1] == "s32":
            bits -= (bits >> (length - 1)) << length
        self.put(operands[0], bits.astype(np.uint32), active)

    def _fma(self, opcode: tuple[str, ...], operands: Any, active: Array | None) -> None:
        assert opcode[-1] == "f32"
        a, b, c = (self.get(o, "f32").astype(np.float64) for o in operands[1:])
        self.put(operands[0], (a * b + c).astype(np.float32), active)

    def _mad(self, opcode: tuple[str, ...], operands: Any, active: Array | None) -> None:
        kind = opcode[-1]
        wide = kind[0] + str(2 * int(kind[1:])) if opcode[1] == "wide" else kind
        a, b = (self.get(o, kind).astype(DTYPES[wide]) for o in operands[1:3])
        self.put(operands[0], a * b + self.get(operands[3], wide), active)

    def _arithmetic(self, opcode: tuple[str, ...], operands: Any, active: Array | None) -> None:
        root, kind = opcode[0], opcode[-1]
        assert "hi" not in opcode  # the upper half of a product: no kernel needs it
        if root == "mul" and opcode[1] == "wide":
            wide = DTYPES[kind[0] + str(2 * int(kind[1:]))]
            a, b = (self.get(o, kind).astype(wide) for o in operands[1:])
            self.put(operands[0], a * b, active)
            return
        values = [self.get(o, kind) for o in operands[1:]]
        if root in ("shl", "shr"):
            values[1] = self.get(operands[2], "u32").astype(values[0].dtype)
        if kind == "pred":
            result = INTEGER[root](*values)
        elif kind.startswith("f"):
            result = FLOAT[root](*values).astype(values[0].dtype)
        elif root in ("div", "rem"):  # towards zero, as in C
            a, b = (v.astype(np.int64) for v in values)
            quotient = np.sign(a) * np.sign(b) * (np.abs(a) // np.maximum(np.abs(b), 1))
            result = (quotient if root == "div" else a - quotient * b).astype(values[0].dtype)
        else:
            result = INTEGER[root](*values)
        self.put(operands[0], result if kind != "f16x2" else result.view(np.uint32), active)
