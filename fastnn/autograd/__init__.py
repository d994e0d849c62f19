"""The differentiable operators: one file each, over the machinery of :mod:`fastnn.autograd.common`.

Every operator has three ways in, and its public function in :mod:`fastnn.functional` picks one by :func:`route`:

- *kernel*: an ``autograd.Function`` around the extension module, for plain eager tensors;
- *op*: an operator of ``torch.ops.fastnn``, for torch.compile, torch.export, fake and meta tensors;
- *torch*: the same function in plain PyTorch, for what no kernel covers.
"""
