"""Figures of whole networks as lines, as Markdown and as plots."""

import math
from pathlib import Path

from benchmarks.network_figures import Figures

HEADER = (
    f'{"network":<25}{"image":>10} {"batch":>5} {"step":>8} {"form":>15}{"ms":>9}{"images/s":>10}'
    f'{"ms/Mpx":>11}{"GiB":>7}{"error":>9}'
)


def line(figures: Figures) -> str:
    """One row of the table, below `HEADER`."""
    case = figures.case
    size = f'{case.height}x{case.width}'
    errors = [e for e in (figures.error, figures.gradient_error) if not math.isnan(e)]
    error = f'{max(errors):.0e}' if errors else '-'
    text = (
        f'{figures.network:<25}{size:>10} {case.batch:>5} {case.step:>8} {case.form:>15}'
        f'{_number(figures.ms, 2):>9}{_number(figures.images_per_second, 0):>10}'
        f'{_number(figures.ms_per_megapixel, 2):>11}{_number(figures.peak_gib, 2):>7}{error:>9}'
    )
    return f'{text}  {figures.note}'.rstrip()


def markdown(rows: list[Figures]) -> str:
    """One table a step and batch: networks down, sizes and forms across, milliseconds."""
    tables = []
    for step, batch in dict.fromkeys((r.case.step, r.case.batch) for r in rows):
        chosen = [r for r in rows if (r.case.step, r.case.batch) == (step, batch)]
        columns = list(dict.fromkeys(_column(r) for r in chosen))
        cells = {(r.network, _column(r)): _number(r.ms, 1) for r in chosen}
        lines = [f'| {step}, batch {batch}, ms | ' + ' | '.join(columns) + ' |']
        lines.append('| --- ' * (len(columns) + 1) + '|')
        for network in dict.fromkeys(r.network for r in chosen):
            row = [cells.get((network, column), '') for column in columns]
            lines.append(f'| {network} | ' + ' | '.join(row) + ' |')
        tables.append('\n'.join(lines))
    return '\n\n'.join(tables)


def plot(rows: list[Figures], macs: dict[tuple[str, int, int], float], file: str) -> None:
    """Multiply-adds, memory and time of one image against its side, as the paper's Figure 4.

    Args:
        rows: Figures, of square images.
        macs: G multiply-adds by network, height and width.
        file: Where to write; the suffix chooses the format.
    """
    import matplotlib

    matplotlib.use('agg')
    from matplotlib import pyplot

    rows = [r for r in rows if r.case.height == r.case.width]
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.2), layout='constrained')
    for network, form in dict.fromkeys((r.network, r.case.form) for r in rows):
        own = [r for r in rows if (r.network, r.case.form) == (network, form)]
        sides = [r.case.height for r in own]
        values = (
            [macs.get((network, side, side), math.nan) for side in sides],
            [r.peak_gib for r in own],
            [r.ms / r.case.batch for r in own],
        )
        for axis, ys in zip(axes, values, strict=True):
            axis.plot(sides, ys, marker='o', label=f'{network}, {form}')
    titles = ('G multiply-adds an image', 'peak GiB', 'ms an image')
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xscale='log', yscale='log', xlabel='side of the image, pixels', title=title)
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize='small')
    figure.savefig(Path(file))
    pyplot.close(figure)


def _column(row: Figures) -> str:
    return f'{row.case.height}x{row.case.width} {row.case.form}'


def _number(x: float, digits: int) -> str:
    return '-' if not math.isfinite(x) else f'{x:,.{digits}f}'
