"""Models of Hugging Face transformers: from a checkpoint to two folders, and back to a PreTrainedModel.

May import `engines` and what is below it, never `engines.torch`.  Begin with `convert`, then `load`.
"""
