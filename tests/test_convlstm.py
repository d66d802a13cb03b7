"What the ConvLSTM notebook leaves out: the compiled pointwise part, which takes a compiler and time, and copies of it."
import copy
import pickle
import shutil

import pytest
import torch

from geoforecast.nn.convlstm import ConvLSTM

needs_compiler = pytest.mark.skipif(not (shutil.which('c++') or shutil.which('g++') or shutil.which('clang++')), reason='no C++ compiler')

@needs_compiler
def test_compiled_pointwise_equals_plain():
    torch.manual_seed(0)
    lstm = ConvLSTM(3, (8,)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 3, 9, 7)
    expected, _ = lstm(x)
    expected_grads = torch.autograd.grad(expected.square().sum(), lstm.parameters())
    outputs, _ = lstm.compile_pointwise()(x)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(torch.autograd.grad(outputs.square().sum(), lstm.parameters()), expected_grads, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pickle.loads(pickle.dumps(lstm))(x)[0], expected)
    torch.testing.assert_close(copy.deepcopy(lstm)(x)[0], expected)

def test_switching_compilation_changes_no_weights():
    lstm = ConvLSTM(3, (8,))
    names = list(lstm.state_dict())
    assert list(lstm.compile_pointwise().state_dict()) == names

@pytest.mark.parametrize('channels_last', [False, True])
def test_checkpointing_under_autocast(channels_last):
    torch.manual_seed(0)
    lstm = ConvLSTM(3, (8, 4), bidirectional=True)
    if channels_last: lstm = lstm.to(memory_format=torch.channels_last)
    x, grads = torch.randn(1, 3, 3, 9, 7), []
    for lstm.checkpointing in (False, True):
        with torch.autocast('cpu', torch.bfloat16): outputs, _ = lstm(x)
        grads.append(torch.autograd.grad(outputs.float().square().sum(), lstm.parameters()))
    torch.testing.assert_close(*grads, rtol=2e-2, atol=2e-2)

@pytest.mark.parametrize('size', [8, 40])  # either side of the limit of `_layout`
def test_checkpointing_notices_a_stack_that_was_changed(size):
    outputs, _ = ConvLSTM(3, (8,), checkpointing=True)(torch.randn(1, 3, 3, size, size))
    with pytest.raises(RuntimeError, match='modified by an inplace operation|being modified inplace'): outputs.relu_().sum().backward()
