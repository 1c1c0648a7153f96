"""Stage 3: judge the pruned model against its parent."""
