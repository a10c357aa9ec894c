"""The engine that plays from a script, which is public: `rlvr.testing.scripted`."""

from rlvr.testing.scripted import ScriptedEngine as ScriptedEngine
