"""Stage 1: run the model one layer at a time and sum what each expert did."""
