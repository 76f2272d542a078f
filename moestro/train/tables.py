"""The tables of rows in a model: which they are, how precise, and where they lie."""

import torch
from torch import Tensor, nn

from moestro.experts import ExpertBank, QuantizedBank
from moestro.ops.quantized import QuantizedTable
from moestro.ops.tables import new_table
from moestro.train.settings import TrainSettings


def row_tables(model: nn.Module) -> list[Tensor]:
    """The tables that banks of experts name as having gradients that are sparse over rows, each once."""
    banks = [module for module in model.modules() if isinstance(module, ExpertBank)]
    return list({id(parameter): parameter for bank in banks for parameter in bank.row_parameters()}.values())


def quantized_tables(model: nn.Module) -> dict[Tensor, QuantizedTable]:
    """Those of them that are codes in 8 bits, each with what it stands for."""
    banks = [module for module in model.modules() if isinstance(module, QuantizedBank) and module.row_parameters()]
    return {codes: table for bank in banks for codes, table in bank.stored().items()}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Whatever an optimizer may have: parameters, and tables of rows that are none."""
    rows = {id(table) for table in row_tables(model)}
    return {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if id(b) in rows}}


def prepare_tables(model: nn.Module, settings: TrainSettings) -> None:
    """Keep the model's tables as precisely as `settings.table_precision` says. Where they lie was decided when they
    were made, by `moestro.ops.tables.tables_in`; their optimizer state goes there, too, where training runs inside it.

    Raises: ValueError for settings about tables where there are none, or of files for tables that are not on the CPU.
    """
    tables = row_tables(model)
    asked = {"table_precision": settings.table_precision != "fp32", "table_folder": settings.table_folder is not None}
    for name in (name for name, set_so in asked.items() if set_so and not tables):
        raise ValueError(f"train {name}={getattr(settings, name)}: no bank trains by rows (sparse_gradients: true)")
    if settings.table_folder is not None and (device := tables[0].device).type != "cpu":
        raise ValueError(f"train table_folder={settings.table_folder}: only tables on the CPU, these are on {device}")
    if settings.table_precision == "bf16":
        for table in tables:
            if isinstance(table, nn.Parameter):
                narrow(table)


@torch.no_grad()
def narrow(table: nn.Parameter) -> None:
    """Make a table bfloat16, to nearest, without another copy of it than the new one."""
    if table.dtype != torch.bfloat16:
        n_rows, width = table.shape
        table.data = new_table(n_rows, width, torch.bfloat16, table.device).copy_(table)
