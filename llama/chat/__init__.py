"""Dialogs as token ids: chat formats, templates, and prompts for infilling."""
