"""A plugin for torch.ao."""
