"""Learned bits: a network's weights and the bits of every value, trained together against a rising pressure.

A network is a list of steps (``program``). A member is such a network in training (``member``); its operations are
compiled (``kernels.bits``). A course trains members in cycles (``course``), and keeps what each cycle gives
(``trained``). A network of a course becomes a state dict and a format per operand (``network``), which the evaluation
takes like any other. The position of a network on the course is its code (``space``).
"""
