"Fires as a plain loader would serve them, written in the benchmark suite from the plain definition."
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent/"bench"))


def test_crops_expanded_later_equal_those_of_the_plain_loader(tmp_path):
    from loading import check_equal, fire_loaders
    with torch.no_grad(): check_equal(*fire_loaders(tmp_path, n=2, shape=(7, 130, 150)))
