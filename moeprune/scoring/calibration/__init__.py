"""Calibration data: where they come from, which samples are drawn, and what the model is given of them."""
