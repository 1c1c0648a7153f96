"""The built-in calibration set, and the programs that made its generated half."""
