"""The commands of ``probmoe``, a module each: its examples, its arguments and what it runs.

torch and transformers are imported where a command runs, so that the parser is quick.
"""
