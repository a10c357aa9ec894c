"""The checks, a module for each group. Each takes a `Context`, raises `CheckFailed`, and returns what it measured."""
