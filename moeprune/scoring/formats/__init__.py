"""From what a checkpoint stores to the plain tensors that transformers loads: numbers decoded, layouts rearranged."""
