"""The model inside other programs: one module each, which imports that program only where it runs in it."""
