"""Model to plan to bundle: capture with `torch.export`, rewrite, save, build engines."""
