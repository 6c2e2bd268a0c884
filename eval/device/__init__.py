"""This package takes the model to a phone: the ExecuTorch program, its expert op, profiles of speed and memory."""
