"""Train the demo model from nothing: data, tokenizer, model, calibration and evaluation files.

    python demo/train.py [--output FOLDER] [--steps N]

The model is a Qwen3-MoE with 3.5 million parameters. Two processes with one thread each train on half of every batch
and average their gradients; every parameter belongs to one of them, which updates it and sends it to the other.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from corpus import (
    BATCH_TOKENS,
    SEED,
    VOCABULARY,
    draw_calibration,
    draw_evaluation,
    identity,
    make_batches,
    train_tokenizer,
    write_samples,
)
from domains import DOMAINS
from transformers import GenerationConfig, Qwen2Tokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

PROCESSES = 2
BALANCE_WEIGHT = 0.01
# glibc otherwise gives every large block back to the system at once and spends the time in page faults.
PROCESS_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
}


def new_model(tokenizer: Qwen2Tokenizer) -> Qwen3MoeForCausalLM:
    """Build the untrained model."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    torch.manual_seed(SEED)
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=64,
    )
    return model


def loss_of(model: Qwen3MoeForCausalLM, rows_BT: torch.Tensor, weights_BT: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the loss to minimise and, without the balance term, to report. B rows, T tokens, N = B x T."""
    rows_BT = rows_BT.long()
    output = model(input_ids=rows_BT[:, :-1], output_router_logits=True, use_cache=False)
    loss_N = F.cross_entropy(output.logits.flatten(0, 1).float(), rows_BT[:, 1:].flatten(), reduction="none")
    weights_N = weights_BT[:, 1:].flatten()
    loss = (loss_N * weights_N).sum() / weights_N.sum()
    balance = sum(imbalance(logits, model.config.num_experts_per_tok) for logits in output.router_logits)
    return loss + BALANCE_WEIGHT * balance, loss.item()


def imbalance(logits_NE: torch.Tensor, chosen: int) -> torch.Tensor:
    """Return E x sum_e(share of choices of e x mean probability of e) of one layer: 1 if all E experts share evenly."""
    probability_NE = logits_NE.float().softmax(-1)
    experts = logits_NE.shape[-1]
    share_E = torch.bincount(logits_NE.topk(chosen).indices.flatten(), minlength=experts) / (len(logits_NE) * chosen)
    return experts * (share_E * probability_NE.mean(0)).sum()


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """Bring all singular values of a batch of matrices near 1 with five Newton-Schulz steps (Muon)."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Optimizer:
    """Muon for matrices, Adam for embeddings, router and norms; masters in float32, kept by the parameter's owner."""

    def __init__(self, model: Qwen3MoeForCausalLM, rank: int) -> None:
        """Deal the parameters out to the processes."""
        self.rank = rank
        self.parameters = list(model.named_parameters())
        layers = [name.split(".")[2] for name, _ in self.parameters]
        self.owner = [int(layer) % PROCESSES if layer.isdigit() else 0 for layer in layers]
        self.master = [p.detach().float().clone() for _, p in self.parameters]
        self.first = [torch.zeros_like(master) for master in self.master]
        self.second = [torch.zeros_like(master) for master in self.master]
        self.steps = 0

    def step(self, learning_rate: float) -> None:
        """Average the gradients over the processes, update what is ours, exchange."""
        gradient = torch.cat([p.grad.flatten() for _, p in self.parameters])
        dist.all_reduce(gradient)
        gradients = gradient.split([p.numel() for _, p in self.parameters])
        self.steps += 1
        for index, (name, parameter) in enumerate(self.parameters):
            if self.owner[index] == self.rank:
                mean = gradients[index].view_as(parameter).float() / PROCESSES
                self.master[index] -= learning_rate * self.update(index, name, mean)
                parameter.data.copy_(self.master[index])
            parameter.grad = None
        for index, (_, parameter) in enumerate(self.parameters):
            dist.broadcast(parameter.data, src=self.owner[index])

    def update(self, index: int, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """Return the step of one parameter for a learning rate of 1."""
        if name.endswith(("_proj", "_proj.weight")):
            return self.muon(index, name, gradient)
        first, second = self.first[index].lerp_(gradient, 0.1), self.second[index].lerp_(gradient.square(), 0.05)
        first, second = first / (1 - 0.9**self.steps), second / (1 - 0.95**self.steps)
        return 0.15 * first / (second.sqrt() + 1e-8)  # 0.003 at a learning rate of 0.02

    def muon(self, index: int, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """Return the orthogonalized momentum; gate and up projections are matrices of their own."""
        momentum = self.first[index].lerp_(gradient, 0.05)
        matrices = gradient.lerp(momentum, 0.95)
        if name.endswith("gate_up_proj"):
            matrices = matrices.unflatten(1, (2, -1)).flatten(0, 1)
        rows, columns = matrices.shape[-2:]
        return (orthogonalized(matrices).float() * max(1.0, rows / columns) ** 0.5).reshape(gradient.shape)


def learning_rate(step: int, steps: int) -> float:
    """Warm up shortly, stay flat for a third, then fall linearly to 2%."""
    done = step / steps
    return 0.02 * min(1.0, (step + 1) / 20, max(0.02, 1 - 0.98 * (done - 1 / 3) / (2 / 3)))


def train(rank: int, batches: list[tuple[torch.Tensor, torch.Tensor]], folder: Path, tokenizer: Qwen2Tokenizer) -> None:
    """Train in one of the processes; the first one reports and saves now and then."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    model = new_model(tokenizer)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("grouped_mm")
    optimizer = Optimizer(model, rank)
    begin, recent = time.monotonic(), []
    for step, (rows, weights) in enumerate(batches):
        loss, reported = loss_of(model, rows[rank::PROCESSES], weights[rank::PROCESSES])
        loss.backward()
        optimizer.step(learning_rate(step, len(batches)))
        recent.append(reported)
        if rank == 0 and (step % 20 == 19 or step + 1 == len(batches)):
            print(
                f"step {step + 1}/{len(batches)}  loss {sum(recent) / len(recent):.4f}  "
                f"{time.monotonic() - begin:.0f} s",
                flush=True,
            )
            recent = []
        if rank == 0 and (step % 100 == 99 or step + 1 == len(batches)):
            save(model, tokenizer, folder / "model")
    dist.destroy_process_group()


def save(model: Qwen3MoeForCausalLM, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Write model and tokenizer in Hugging Face format, the config as Qwen publishes it: other engines read that."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["num_experts"] = config.pop("num_local_experts")
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = None
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Make everything that the demo folder contains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder for model and samples")
    parser.add_argument("--steps", type=int, default=3000, help=f"training steps of {BATCH_TOKENS} tokens")
    arguments = parser.parse_args()
    folder = arguments.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(PROCESS_ENVIRONMENT)

    evaluation = {domain: draw_evaluation(domain) for domain in DOMAINS}
    held_out = {identity(sample) for domain in DOMAINS if domain != "facts" for sample in evaluation[domain]}
    tokenizer = train_tokenizer(held_out)
    write_samples(folder / "evaluation.jsonl", evaluation)
    write_samples(
        folder / "calibration.jsonl", {domain: draw_calibration(domain, held_out, tokenizer) for domain in DOMAINS}
    )
    batches = make_batches(arguments.steps, held_out, tokenizer)
    print(f"{len(batches)} batches of {BATCH_TOKENS} tokens", flush=True)
    (folder / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.spawn(train, (batches, folder, tokenizer), nprocs=PROCESSES)
    (folder / "rendezvous").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
