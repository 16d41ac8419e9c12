import glob
import hashlib
from pathlib import Path

import torch


class Corpus:
    def __init__(self, name, kind):
        self.name = name
        self.kind = kind
        self.classes = 256
        import networkx

        data = b"".join(
            Path(f).read_bytes() for f in sorted(glob.glob(str(Path(networkx.__file__).parent) + "/algorithms/**/*.py", recursive=True))
        )
        self.digest = hashlib.sha256(data).hexdigest()
        n = len(data)
        self.parts = {"train": data[: int(0.8 * n)], "choose": data[int(0.8 * n) : int(0.9 * n)], "judge": data[int(0.9 * n) :]}

    def split(self, name, shape):
        t = torch.frombuffer(bytearray(self.parts[name]), dtype=torch.uint8).long()
        return D(t, shape[0])


class D(torch.utils.data.Dataset):
    def __init__(self, t, T):
        self.t = t
        self.T = T

    def __len__(self):
        return len(self.t) // self.T

    def __getitem__(self, i):
        return {"input_ids": self.t[i * self.T : (i + 1) * self.T]}


def corpus(data, kind, *, folder, tokenizer=None):
    return Corpus(data, kind)
