"""The backend `unsloth`, as a third party would write it: it uses only what rlvr offers to everybody."""
