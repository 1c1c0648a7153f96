"""Stage 2: write the smaller checkpoint as bytes, then check it independently."""
