"""C99 without dependencies, for microcontrollers: a header and a source, judged by gcc with UBSan."""

from __future__ import annotations

import math
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bitfront.errors import ExportError
from bitfront.exporters.c99 import cortex_m
from bitfront.exporters.c99.loops import Source
from bitfront.exporters.c99.needs import needs
from bitfront.exporters.c99.numbers import helpers
from bitfront.exporters.c99.stages import member
from bitfront.exporters.c99.tables import SIZES, type_of
from bitfront.exporters.lowering import lowered
from bitfront.exporters.program import Floats, Product, Program, Value
from bitfront.exporters.targets import TARGETS
from bitfront.exporters.targets.base import Candidate, Target, TargetSettings

#: How the judge compiles: a warning is an error, and undefined behaviour ends the program.
FLAGS = (
    "-std=c99 -O1 -Wall -Wextra -Werror -pedantic -fsanitize=undefined -fno-sanitize-recover=all -ffp-contract=off"
).split()
#: Samples that are run on QEMU.
ON_QEMU = 16
#: Seconds after which a compiler or a program is taken to hang.
_PATIENCE = 600


class CSettings(TargetSettings):
    """Settings of the target c."""

    compiler: str = Field("cc", description="the C compiler that judges the files")
    qemu: bool = Field(
        False,
        description=f"whether the first {ON_QEMU} samples are also run on a Cortex-M4 that QEMU imitates; needs "
        "gcc-arm-none-eabi and qemu-system-arm",
    )


@TARGETS.register("c")
class C(Target):
    """C99 without dependencies: a header and a source with static buffers, for microcontrollers."""

    Settings = CSettings
    settings: CSettings
    judge = "a C compiler with UBSan"

    def check(self, candidate: Candidate) -> None:
        """Raises ExportError for steps without C, or if there is no compiler."""
        program = _program(candidate)
        for step, value in zip(program.steps, program.values, strict=True):
            if isinstance(step, Product) and step.window is not None and len(step.window.kernel) > 2:
                raise ExportError(f"{value.name}: a convolution over three dimensions is not written as C")
        if shutil.which(self.settings.compiler) is None:
            raise ExportError(
                f"there is no C compiler called {self.settings.compiler!r} to judge the files; install gcc, or name "
                "another one with --set compiler=NAME"
            )
        if self.settings.qemu and (tool := cortex_m.missing()):
            raise ExportError(
                f"there is no {tool}, which qemu = true needs; install it (apt-get install gcc-arm-none-eabi "
                "qemu-system-arm), or leave qemu out"
            )

    def write(self, candidate: Candidate, folder: Path) -> None:
        """NAME.h, NAME.c, and check.c, which runs the network on a file of floats."""
        name, program = candidate.name, _program(candidate)
        source = Source(program)
        (folder / f"{name}.h").write_text(_header(name, program, source), encoding="utf-8")
        (folder / f"{name}.c").write_text(_body(name, source), encoding="utf-8")
        check = _CHECK if source.coded is None else _CHECK_CODES
        (folder / "check.c").write_text(check.replace("NAME", name).replace("UPPER", name.upper()), encoding="utf-8")

    def computed(self, candidate: Candidate, folder: Path, x: Floats) -> NDArray[Any]:
        """What the compiled files compute."""
        name = candidate.name
        program = folder / "check"
        try:
            command = [self.settings.compiler, *FLAGS, f"{name}.c", "check.c", "-o", "check", "-lm"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_PATIENCE, check=False)
            if done.returncode:
                raise ExportError(f"the C compiler refuses the files: {done.stderr.strip()[-600:]}")
            data = np.ascontiguousarray(x, np.float32).tobytes()
            ran = subprocess.run(
                [str(program.absolute())], input=data, capture_output=True, timeout=_PATIENCE, check=False
            )
            if ran.returncode:
                raise ExportError(f"the C program failed: {ran.stderr.decode(errors='replace').strip()[-600:]}")
        except subprocess.TimeoutExpired:
            raise ExportError(f"the C compiler or the program took more than {_PATIENCE} s") from None
        finally:
            program.unlink(missing_ok=True)
        value = _program(candidate).result
        kind = np.dtype(type_of(value).removesuffix("_t").replace("float", "float32"))
        numbers = np.frombuffer(ran.stdout, kind).reshape(len(x), *value.shape)
        if self.settings.qemu:
            some = min(ON_QEMU, cortex_m.fits(x))
            again = np.frombuffer(cortex_m.run(name, folder, x[:some]).outputs, kind)
            if not np.array_equal(again, numbers[:some].ravel()):
                raise ExportError(
                    f"c: not kept: the Cortex-M4 computes other numbers than {self.settings.compiler} of these files; "
                    "please report this"
                )
        return numbers if value.floats else numbers.astype(np.int64)

    def usage(self, candidate: Candidate) -> str:
        """How to call it."""
        name = candidate.name
        as_well = f"""
The first samples were run on QEMU's Cortex-M4 as well: `{cortex_m.COMPILER} {" ".join(cortex_m.FLAGS)}`.
"""
        return f"""
Add `{name}.c` and `{name}.h` to the project, and call

```c
#include "{name}.h"
{name}_run(input, output);   /* {name.upper()}_INPUTS floats in, {name.upper()}_OUTPUTS numbers out */
```

Inputs must be finite. The function keeps its buffers in static memory, so it is for one thread at a time. Shifts of
negative numbers must be arithmetic, as with gcc and clang. `check.c` reads float32 samples from standard input and
writes the outputs: `{self.settings.compiler} {" ".join(FLAGS)} {name}.c check.c -lm`.
{as_well if self.settings.qemu else ""}"""

    def figures(self, candidate: Candidate) -> dict[str, float]:
        """Bytes of constants and of buffers, and cycles by the model of ``c99/cycles.py``; the code is not counted."""
        needed = needs(_program(candidate))
        return {"flash_bytes": needed.flash, "ram_bytes": needed.ram, "cycles": round(needed.cycles)}


@lru_cache(maxsize=1)
def _program(candidate: Candidate) -> Program:
    """The program that is written. With full ranges, the metrics of many candidates can tell what each needs."""
    return lowered(candidate.graph, candidate.formats, full_ranges=True)


def _header(name: str, program: Program, source: Source) -> str:
    value, upper = program.result, name.upper()
    kind = type_of(value)
    return f"""/* {name}: written by Bitfront. Each output: {_meaning(value)}. */
#ifndef {upper}_H
#define {upper}_H

#include <stdint.h>

#define {upper}_INPUTS {int(np.prod(program.input_shape))}
#define {upper}_OUTPUTS {int(np.prod(value.shape))}
/* Bytes of constants, without the code, and of static buffers. */
#define {upper}_FLASH_BYTES {source.tables.bytes}
#define {upper}_RAM_BYTES {source.ram}

typedef {kind} {name}_output_t;

void {name}_run(const float *input, {name}_output_t *output);
{_codes_header(name, source)}
#endif
"""


def _meaning(value: Value) -> str:
    if value.floats:
        return "a float"
    if value.scale is not None:
        return f"n stands for n * {value.scale.ravel()[0]:.9g}" if value.scale.size == 1 else "a scale per channel"
    return f"n stands for n * 2^{-value.point}" + ("" if value.divisor == 1 else f" / {value.divisor}")


def _codes_header(name: str, source: Source) -> str:
    """The functions for inputs that are rounded elsewhere, where the network has one rounding of its input."""
    if source.coded is None:
        return ""
    value = source.program.values[source.coded]
    return f"""
/* The same in two steps: inputs as whole numbers, {name.upper()}_CODES of them ({_meaning(value)}), and the rest. */
#define {name.upper()}_CODES {math.prod(value.shape)}
typedef {type_of(value)} {name}_code_t;
void {name}_quantize(const float *input, {name}_code_t *codes);
void {name}_infer(const {name}_code_t *codes, {name}_output_t *output);
"""


def _body(name: str, source: Source) -> str:
    # Each array has all bytes of the union, so that storing a number of one type leaves the bytes of others alone.
    arrays = [f"    {kind} {member(kind)}[{source.memory.bytes // SIZES[kind]}];" for kind in source.memory.kinds]
    arena = ["static union {", *arrays, "} arena;"] if arrays else []
    if source.row:
        arena.append(f"static int8_t row[{source.row}];")
    return "\n".join(
        [
            f"/* {name}: written by Bitfront. */",
            "#include <math.h>",
            f'#include "{name}.h"',
            "",
            helpers(),
            *source.tables.lines,
            "",
            *arena,
            "",
            *_functions(name, source),
            "",
        ]
    )


def _functions(name: str, source: Source) -> list[str]:
    output = f"{name}_output_t *output"
    if source.coded is None:
        return [f"void {name}_run(const float *input, {output})", "{", *source.code, "}"]
    lines, variable = source.rounding
    count = math.prod(source.program.values[source.coded].shape)
    each, held = f"    for (int32_t i = 0; i < {count}; i++) ", source.at(source.coded, "i")
    return [
        f"static {name}_code_t code(const float *input, int32_t i)",
        "{",
        *(f"    {line}" for line in lines),
        f"    return ({name}_code_t){variable};",
        "}",
        "",
        f"static void layers({output})",
        "{",
        *source.code,
        "}",
        "",
        f"void {name}_quantize(const float *input, {name}_code_t *codes)",
        "{",
        f"{each}codes[i] = code(input, i);",
        "}",
        "",
        f"void {name}_infer(const {name}_code_t *codes, {output})",
        "{",
        f"{each}{held} = codes[i];",
        "    layers(output);",
        "}",
        "",
        f"void {name}_run(const float *input, {output})",
        "{",
        f"{each}{held} = code(input, i);",
        "    layers(output);",
        "}",
    ]


_CHECK = """/* Reads float32 samples from standard input, and writes the outputs of each to standard output. */
#include <stdio.h>
#include "NAME.h"

int main(void)
{
    static float input[UPPER_INPUTS];
    static NAME_output_t output[UPPER_OUTPUTS];
    while (fread(input, sizeof *input, UPPER_INPUTS, stdin) == UPPER_INPUTS) {
        NAME_run(input, output);
        if (fwrite(output, sizeof *output, UPPER_OUTPUTS, stdout) != UPPER_OUTPUTS) return 1;
    }
    return 0;
}
"""
#: The same, and whether the two functions for rounded inputs give the same outputs.
_CHECK_CODES = (
    _CHECK.replace("#include <stdio.h>", "#include <stdio.h>\n#include <string.h>")
    .replace(
        "    while",
        "    static NAME_output_t again[UPPER_OUTPUTS];\n    static NAME_code_t codes[UPPER_CODES];\n    while",
    )
    .replace(
        "        if (fwrite",
        "        NAME_quantize(input, codes);\n        NAME_infer(codes, again);\n"
        "        if (memcmp(output, again, sizeof output)) return 2;\n        if (fwrite",
    )
)
