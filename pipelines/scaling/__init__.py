"""The on-device scaling law: evaluate it, fit it, solve it for a phone, and run the sweep that feeds it."""
