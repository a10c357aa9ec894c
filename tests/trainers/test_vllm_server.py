"""Runs that sample on a vLLM server: a stand-in that answers TRL's own client over HTTP. Weights, which TRL sends from
one GPU to another, are handed over in this process."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec

import pytest
import torch
from sampled import sampled
from short_runs import SMALL, environment
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.generation import vllm_client, vllm_generation

import rlvr
from rlvr.errors import SamplerDriftError
from rlvr.testing.conformance.context import plain_name
from rlvr.trainers import colocated

pytestmark = pytest.mark.both


class Server(ThreadingHTTPServer):
    """`trl vllm-serve` as far as training asks: it samples with a model of its own."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.asked, self.updates = [], 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def complete(self, body):
        self.asked.append(body)
        prompts = [ids for ids in body["prompt"] for _ in range(body["n"])]
        completions, logprobs = sampled(
            self.model,
            self.tokenizer,
            prompts,
            limit=body["max_tokens"],
            temperature=body["temperature"],
            seed=len(self.asked),
        )
        return {"choices": [choice(*row) for row in zip(prompts, completions, logprobs, strict=True)]}

    def update(self, announced, weights):
        """What comes has to be what was announced, in its order: the real one receives into buffers made for that."""
        own, received = dict(self.model.named_parameters()), []
        with torch.no_grad():
            for name, value in weights:
                received.append((name, str(value.dtype).removeprefix("torch."), list(value.shape)))
                own[name].copy_(value)
        assert received == announced
        assert {name for name, _, _ in received} == own.keys()
        self.updates += 1


def choice(prompt, ids, logprobs):
    tokens = [f"token_id:{token}" for token in ids]
    return {
        "prompt_token_ids": prompt,
        "token_ids": ids,
        "logprobs": {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": [None] * len(ids)},
    }


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        config = {"model_config": {"logprobs_mode": "processed_logprobs"}, "weight_transfer_config": {}}
        self._send({"/v1/models": {"data": [{"id": "m"}]}}.get(self.path, {"vllm_config": config}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        self._send(self.server.complete(body) if self.path == "/v1/completions" else {"success": True})

    def _send(self, answer):
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(model_folder, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(colocated, "find_spec", lambda name: ModuleSpec(name, None))
    for module in (vllm_client, vllm_generation):
        monkeypatch.setattr(module, "is_vllm_available", lambda: True)
    with Server(model_folder) as server:
        monkeypatch.setattr(vllm_client.VLLMClient, "init_communicator", lambda self, device: None)
        monkeypatch.setattr(
            vllm_client.VLLMClient, "update_named_params", lambda self, *announced: server.update(*announced)
        )
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def train(server, model_folder, folder):
    """The canary compares the server with the training forward at every step."""
    return rlvr.train(
        environment(), str(model_folder), "hf", **SMALL | {"learning_rate": 5e-2, "max_tokens": 6},
        rollout_engine="vllm", vllm_server=server.url, dtype="float32", max_steps=3, canary_every=1,
        output_dir=folder / "run",
    )  # fmt: skip


def test_a_run_samples_on_the_server_from_the_policy_as_it_is_trained(server, model_folder, tmp_path):
    fresh = {name: value.clone() for name, value in server.model.named_parameters()}
    run = train(server, model_folder, tmp_path)
    assert run.summary["rollout_engine"] == "vllm"
    assert server.updates == 3  # one before each rollout
    assert {body["max_tokens"] for body in server.asked} == {6}
    assert [len(body["prompt"]) * body["n"] for body in server.asked] == [8, 8, 8]
    drifts = [row["sampler_drift"] for row in run.metrics() if "sampler_drift" in row]
    assert len(drifts) == 3
    assert max(drifts) < 1e-4
    last = dict(server.model.named_parameters())
    moved = [name for name, value in fresh.items() if not torch.equal(value, last[name])]
    assert len(moved) == 14  # the seven projections of two layers have adapters
    frozen = {name: value for name, value in run.policy.model.named_parameters() if "base_layer" in name}
    for name, value in frozen.items():
        assert torch.equal(value, fresh[plain_name(name)]), name


def test_a_server_that_does_not_take_the_weights_stops_the_run(server, model_folder, tmp_path):
    server.update = lambda announced, weights: [*weights]
    with pytest.raises(SamplerDriftError, match="'vllm' does not sample from the policy"):
        train(server, model_folder, tmp_path)
