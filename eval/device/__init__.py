"""The model on a phone: the ExecuTorch program, its expert op, and profiles of speed and memory."""
