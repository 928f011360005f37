"""An integer program as C99 without dependencies.

Steps that treat each number alone (a bias, a ReLU, a rounding) are done in the loop of the step before them, so that
sums stay in a register and only rounded numbers are stored. Every buffer is static; buffers whose values are not needed
at the same time share memory. Weights are held in as few bits as the widest one needs: 2, 4, 8, 16 or 32.
"""
