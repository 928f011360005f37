"""Runs a C source on a Cortex-M4 that QEMU imitates, as a second judge, and counts its instructions.

The board is QEMU's ``mps2-an386``. No library is needed beside the compiler: the start-up code, the output
(semihosting) and the few functions of ``math.h`` that a source calls are here. QEMU counts a nanosecond per
instruction, so the system's timer, which ticks 25 million times a second, counts 40 instructions a tick.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront.errors import ExportError
from bitfront.exporters.program import Floats

COMPILER, MACHINE = "arm-none-eabi-gcc", "qemu-system-arm"
#: How a source is compiled for a Cortex-M4 with its floating-point unit.
FLAGS = "-mcpu=cortex-m4 -mthumb -mfloat-abi=hard -mfpu=fpv4-sp-d16 -Os -std=c99 -Wall -Wextra -Werror".split()
#: Floats of the samples that are put into the program's memory.
_MOST = 200_000
_PATIENCE = 300
#: Instructions per tick of the timer.
TICK = 40


@dataclass(frozen=True, eq=False)
class Ran:
    """What a run gave.

    Attributes:
        outputs: the bytes of the outputs of all samples.
        instructions: of one sample, the mean.
    """

    outputs: bytes
    instructions: float


def missing() -> str:
    """The program that is not installed; "" if none is missing."""
    return next((tool for tool in (COMPILER, MACHINE) if shutil.which(tool) is None), "")


def fits(x: Floats) -> int:
    """How many of some samples fit."""
    return min(len(x), max(1, _MOST // max(1, x[0].size))) if len(x) else 0


def run(name: str, folder: Path, x: NDArray[Any]) -> Ran:
    """The outputs of the source `name` in `folder` on a few samples.

    Raises:
        ExportError: the compiler or the machine fails; the message has its words.
    """
    part = folder / "cortex-m4"
    part.mkdir()
    try:
        (part / "main.c").write_text(_main(name, x), encoding="utf-8")
        (part / "board.ld").write_text(_BOARD, encoding="utf-8")
        (part / "math.h").write_text(_MATH, encoding="utf-8")
        # The compiler must not turn the functions of math.h into calls of themselves.
        command = [COMPILER, *FLAGS, "-fno-builtin", "-nostdlib", "-I", ".", "-I", "..", "-T", "board.ld", "main.c"]
        _call([*command, f"../{name}.c", "-o", "program.elf", "-lgcc"], part)
        target = "-semihosting-config enable=on,target=native -icount shift=0 -kernel program.elf"
        machine = "-M mps2-an386 -nographic -monitor none -serial none"
        printed = _call([MACHINE, *machine.split(), *target.split()], part)
    finally:
        shutil.rmtree(part)
    *rows, ticks = printed.split()
    return Ran(bytes.fromhex("".join(rows)), int(ticks, 16) * TICK / len(x))


def _call(command: list[str], folder: Path) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise ExportError(f"{command[0]} took more than {_PATIENCE} s") from None
    if done.returncode:
        raise ExportError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[-600:]}")
    return done.stdout + ("" if done.stdout else done.stderr)


def _main(name: str, x: NDArray[Any]) -> str:
    words = np.ascontiguousarray(x, np.float32).view(np.uint32).ravel()
    rows = [", ".join(map(hex, words[i : i + 12].tolist())) for i in range(0, len(words), 12)]
    table = "{\n" + ",\n".join(rows) + "}"
    made = _MAIN.replace("NAME", name).replace("UPPER", name.upper())
    return made.replace("SAMPLES", str(len(x))).replace("WORDS", table)


_BOARD = """\
MEMORY { FLASH (rx) : ORIGIN = 0x00000000, LENGTH = 4M  RAM (rwx) : ORIGIN = 0x20000000, LENGTH = 4M }
ENTRY(start)
SECTIONS {
  .text : { KEEP(*(.vectors)) *(.text*) *(.rodata*) . = ALIGN(4); } > FLASH
  .ARM.exidx : { *(.ARM.exidx*) } > FLASH
  .bss (NOLOAD) : { *(.data*) *(.bss*) *(COMMON) } > RAM
}
"""

_MATH = """\
#define INFINITY __builtin_inff()
float rintf(float v);
float floorf(float v);
double floor(double v);
"""

_MAIN = r"""
#include <math.h>
#include <stdint.h>
#include "NAME.h"

void start(void);
__attribute__((section(".vectors"), used)) static void (*const vectors[2])(void) = {
    (void (*)(void))0x20400000, start
};

static int call(int operation, const void *argument)
{
    register int r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

static void print(const uint8_t *bytes, uint32_t count)
{
    static char text[130];
    while (count) {
        uint32_t n = 0;
        for (; count && n < 128; count--, bytes++) {
            text[n++] = "0123456789abcdef"[*bytes >> 4];
            text[n++] = "0123456789abcdef"[*bytes & 15];
        }
        text[n] = '\n';
        text[n + 1] = 0;
        call(4, text);
    }
}

/* The functions of math.h, exact for every number. */
float rintf(float v) { return v >= 8388608.0f || v <= -8388608.0f ? v
    : v < 0 ? -((-v + 8388608.0f) - 8388608.0f) : (v + 8388608.0f) - 8388608.0f; }
float floorf(float v) { float whole = rintf(v); return whole > v ? whole - 1.0f : whole; }
double floor(double v)
{
    if (v >= 4503599627370496.0 || v <= -4503599627370496.0) return v;
    double whole = (double)(int64_t)v;
    return whole > v ? whole - 1.0 : whole;
}
void *memcpy(void *to, const void *from, __SIZE_TYPE__ count)
{
    char *t = to;
    for (const char *f = from; count; count--) *t++ = *f++;
    return to;
}
void *memset(void *to, int byte, __SIZE_TYPE__ count)
{
    for (char *t = to; count; count--) *t++ = (char)byte;
    return to;
}

#define REGISTER(place) (*(volatile uint32_t *)(place))
static const uint32_t samples[] = WORDS;
static float input[UPPER_INPUTS];
static NAME_output_t output[UPPER_OUTPUTS];

void start(void)
{
    uint32_t ticks = 0;
    REGISTER(0xE000ED88) |= 0xF << 20; /* the floating-point unit */
    REGISTER(0xE000E014) = 0xFFFFFF;
    REGISTER(0xE000E018) = 0;
    REGISTER(0xE000E010) = 5; /* the timer, with the clock of the processor */
    for (uint32_t s = 0; s < SAMPLES; s++) {
        memcpy(input, samples + s * UPPER_INPUTS, sizeof input);
        uint32_t before = REGISTER(0xE000E018);
        NAME_run(input, output);
        ticks += (before - REGISTER(0xE000E018)) & 0xFFFFFF;
        print((const uint8_t *)output, sizeof output);
    }
    uint8_t last[4] = {ticks >> 24, ticks >> 16, ticks >> 8, ticks};
    print(last, 4);
    call(0x18, (const void *)0x20026);
    for (;;) {}
}
"""
