"""INT4 weights and INT8 activations: `formulas` has the arithmetic, `qat` trains with it."""
