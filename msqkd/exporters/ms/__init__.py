"""MindSpore Lite's model file, ``.ms``: its layout, a writer, a reader, and what the runtime asks of a program."""
