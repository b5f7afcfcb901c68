"""Dialogs to token ids: chat formats, templates, and prompts for infilling."""
