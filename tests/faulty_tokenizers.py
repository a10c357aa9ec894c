"""Backends that save another tokenizer than the policy's: `hf` otherwise."""

import copy
from dataclasses import replace

from rlvr.backends.hf.backend import HFBackend

OTHER_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


class SavesOtherTemplate(HFBackend):
    def save(self, policy, folder, export_format="adapter"):
        tokenizer = copy.deepcopy(policy.tokenizer)
        tokenizer.chat_template = OTHER_TEMPLATE
        super().save(replace(policy, tokenizer=tokenizer), folder, export_format)


class SavesOtherEnd(HFBackend):
    def save(self, policy, folder, export_format="adapter"):
        tokenizer = copy.deepcopy(policy.tokenizer)
        tokenizer.eos_token = tokenizer.pad_token
        super().save(replace(policy, tokenizer=tokenizer), folder, export_format)
