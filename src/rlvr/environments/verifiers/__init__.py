"""Environments of the verifiers library. Light, as its plugin is a part of it: `adapter` imports the library."""
