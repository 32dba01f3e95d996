"""The training loop, its optimisers, its state on disk, and evaluation."""
