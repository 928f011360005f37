"""Testbenches of exported logic, in Verilog and in VHDL: they run it on the lines of a file of hexadecimal numbers.

A sample enters with every clock, or at once where there are no registers. What the logic gives is written to a file, or
compared with the lines of another one.
"""

from __future__ import annotations

from typing import Literal

Language = Literal["verilog", "vhdl"]


def testbench(language: Language, name: str, inputs: int, outputs: int, registers: int) -> str:
    """The source of a module or entity ``testbench``.

    Args:
        name: of the module or entity that it runs, whose ports are ``model_inp``, ``model_out``, and ``clk`` with
            registers.
        inputs, outputs: bits of the two ports.
        registers: clocks after which a result is there; 0: it is there at once, and there is no clock.
    """
    text, clock, clocked, combinational = _TEXTS[language]
    places = {
        "@NAME": name,
        "@IN": str(inputs - 1),
        "@OUT": str(outputs - 1),
        "@CLOCK": clock if registers else "",
        "@STEP": clocked.replace("@REGISTERS", str(registers)) if registers else combinational,
    }
    for place, what in places.items():
        text = text.replace(place, what)
    return text


_VERILOG = """// Runs @NAME on the lines of a file, a sample with every clock, and writes or compares what it gives:
// +inputs=FILE, and +outputs=FILE or +expected=FILE. Written by Bitfront.
`timescale 1 ns / 1 ps

module testbench;
    reg clk = 0;
    reg [@IN:0] sample, line;
    wire [@OUT:0] result;
    reg [@OUT:0] wanted;
    reg [8*1024-1:0] inputs, outputs, expected;
    integer from, to, beside, entered, left, differing, clocks, more;

    @NAME dut (@CLOCK.model_inp(sample), .model_out(result));

    task leave;
        begin
            if (to) $fdisplay(to, "%h", result);
            if (beside) begin
                if ($fscanf(beside, "%h\\n", wanted) != 1 || wanted !== result) differing = differing + 1;
            end
            left = left + 1;
        end
    endtask

    initial begin
        to = 0; beside = 0; entered = 0; left = 0; differing = 0; clocks = 0; more = 1;
        if (!$value$plusargs("inputs=%s", inputs)) begin $display("give +inputs=FILE"); $finish; end
        from = $fopen(inputs, "r");
        if ($value$plusargs("outputs=%s", outputs)) to = $fopen(outputs, "w");
        if ($value$plusargs("expected=%s", expected)) beside = $fopen(expected, "r");
        while (more || left < entered) begin
            if (more) begin
                // An assignment, because some simulators do not notice what a file is read into.
                if ($fscanf(from, "%h\\n", line) == 1) entered = entered + 1;
                else more = 0;
                sample = line;
            end
            @STEP
        end
        if (to) $fclose(to);
        if (beside) $display("%0d of %0d samples differ", differing, left);
        $finish;
    end
endmodule
"""

_VHDL = """-- Runs @NAME on the lines of a file, a sample with every clock, and writes or compares what it gives:
-- generics inputs, and outputs or expected. VHDL-2008. Written by Bitfront.
library ieee;
use ieee.std_logic_1164.all;
use std.textio.all;

entity testbench is
    generic (inputs, outputs, expected : string := "");
end entity testbench;

architecture run of testbench is
    signal clk : std_logic := '0';
    signal sample : std_logic_vector(@IN downto 0) := (others => '0');
    signal result : std_logic_vector(@OUT downto 0);
begin
    dut : entity work.@NAME port map (@CLOCKmodel_inp => sample, model_out => result);

    process
        file from_file, to_file, beside : text;
        variable row : line;
        variable word : std_logic_vector(@IN downto 0);
        variable wanted : std_logic_vector(@OUT downto 0);
        variable entered, left, differing, clocks : natural := 0;
        variable more : boolean := true;

        procedure leave is
        begin
            if outputs /= "" then
                hwrite(row, result);
                writeline(to_file, row);
            end if;
            if expected /= "" then
                readline(beside, row);
                hread(row, wanted);
                if wanted /= result then differing := differing + 1; end if;
            end if;
            left := left + 1;
        end procedure leave;
    begin
        file_open(from_file, inputs, read_mode);
        if outputs /= "" then file_open(to_file, outputs, write_mode); end if;
        if expected /= "" then file_open(beside, expected, read_mode); end if;
        while more or left < entered loop
            if more then
                if endfile(from_file) then
                    more := false;
                else
                    readline(from_file, row);
                    hread(row, word);
                    entered := entered + 1;
                    sample <= word;
                end if;
            end if;
            @STEP
        end loop;
        if outputs /= "" then file_close(to_file); end if;
        if expected /= "" then
            write(output, integer'image(differing) & " of " & integer'image(left) & " samples differ" & LF);
        end if;
        wait;
    end process;
end architecture run;
"""

#: Language → (text, connection of the clock, a step with registers, a step without).
_TEXTS: dict[Language, tuple[str, str, str, str]] = {
    "verilog": (
        _VERILOG,
        ".clk(clk), ",
        "#1 clk = 1; #1 clk = 0; clocks = clocks + 1; if (clocks >= @REGISTERS) leave;",
        "#1; if (more) leave;",
    ),
    "vhdl": (
        _VHDL,
        "clk => clk, ",
        "wait for 1 ns; clk <= '1'; wait for 1 ns; clk <= '0'; clocks := clocks + 1;\n"
        "            if clocks >= @REGISTERS then leave; end if;",
        "wait for 1 ns; if more then leave; end if;",
    ),
}
