"""Counts what is original in what makemore invents, for the model card.

    pip install -r tests/benchmarks/requirements.txt
    python tests/benchmarks/invention.py MAKEMORE.PY

MAKEMORE.PY is that file of https://github.com/karpathy/makemore at commit 013af92
(later ones call its classes otherwise). Its transformer is trained with the
program's own defaults on each list of the shipped models: as there, on nine
tenths, with the loss on the last tenth taken every 500 steps. The weights of the
lowest one then invent 10,000 sequences at temperature 1, which are counted as
build.py counts those of the shipped models. 8,000 steps are several times what it
takes until that loss only rises. 15 minutes on two cores.
"""

import argparse
import copy
import importlib.util
import pathlib
import sys
import types

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "pre_trained_models"))

import build  # noqa: E402 - found by the line above

STEPS, EVERY, SEED = 8000, 500, 3407


def load_module(path):
    """Returns the module that a Python file is."""
    spec = importlib.util.spec_from_file_location("makemore", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tensorboard"] = types.ModuleType("tensorboard")
    sys.modules["torch.utils.tensorboard"] = types.SimpleNamespace(SummaryWriter=None)
    spec.loader.exec_module(module)
    module.args = types.SimpleNamespace(device="cpu")  # its evaluate() reads it
    return module


def invent(makemore, sequences):
    """Trains makemore's transformer on a list of str.

    Returns the lowest loss on the tenth that it held out, in nats per character,
    and 10,000 sequences that the weights of that moment invent.
    """
    torch.manual_seed(SEED)
    characters, longest = sorted(set("".join(sequences))), max(map(len, sequences))
    most = len(sequences) * 9 // 10
    learned, held_out = (
        makemore.CharDataset(part, characters, longest)
        for part in (sequences[:most], sequences[most:])
    )
    sizes = {"vocab_size": learned.get_vocab_size(), "block_size": learned.get_output_length()}
    network = makemore.GPT(makemore.GPTConfig(**sizes))
    optimizer = network.configure_optimizers(makemore.TrainConfig())
    # As its own loader does: batches drawn with replacement.
    sampler = torch.utils.data.RandomSampler(learned, replacement=True, num_samples=10**9)
    batches = iter(torch.utils.data.DataLoader(learned, sampler=sampler, batch_size=32))
    best, weights = float("inf"), None
    for step in range(1, STEPS + 1):
        _, loss = network(*next(batches))
        network.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if step % EVERY == 0:
            loss = makemore.evaluate(network, held_out, batch_size=100)
            print(f"  step {step}: {loss:.4f}", flush=True)
            if loss < best:
                best, weights = loss, copy.deepcopy(network.state_dict())
    network.load_state_dict(weights)
    network.eval()
    texts = []
    for _ in range(10):
        start = torch.zeros(1000, 1, dtype=torch.long)
        rows = network.generate(start, sizes["block_size"] - 1, do_sample=True)[:, 1:].tolist()
        ends = [row.index(0) if 0 in row else len(row) for row in rows]
        texts += [learned.decode(row[:end]) for row, end in zip(rows, ends)]
    return best, texts


def main():
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", metavar="MAKEMORE.PY")
    makemore = load_module(parser.parse_args().path)
    for stem in build.LISTS:
        print(f"{stem}:")
        sequences = build.read_list(stem)
        loss, texts = invent(makemore, sequences)
        shares = *build.count_invented(stem, sequences, texts), texts.count("") / len(texts)
        names = "new", "different", *["known"] * (len(shares) == 4), "empty"
        print(f"  lowest loss on the tenth held out: {loss:.3f} nats per character")
        for name, share in zip(names, shares):
            print(f"  {name}: {share:.2%}")


if __name__ == "__main__":
    main()
