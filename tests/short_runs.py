"""The environment and the settings of short runs whose weights are looked at."""

import rlvr

SMALL = {
    "max_prompt_length": 64,
    "max_tokens": 4,
    "num_generations": 4,
    "prompts_per_step": 2,
    "save_steps": 1,
    "eval_samples": 2,
    "learning_rate": 5e-3,
    "report_to": "none",
    "gradient_checkpointing": False,
}


def bytes_modulo_7(trajectory):
    return float(sum(map(ord, trajectory.text)) % 7)


def environment():
    rows = [{"question": f"{n}+1", "answer": str(n + 1)} for n in range(12)]
    return rlvr.Environment(
        name="bytes", train_dataset=rows[:9], eval_dataset=rows[9:], rubric=rlvr.Rubric(bytes_modulo_7)
    )
