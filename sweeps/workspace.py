"""A saved W&B workspace over the runs of a project; the names it reads are those of docs/tracking.md.

    pip install 'moeprune[dashboards]'
    python sweeps/workspace.py ENTITY/PROJECT

Panels: the front of perplexity against bytes, parallel coordinates of choices and results, kept-channel heat maps per
layer, and loss curves of recoveries. Saving needs a W&B login.
"""

import sys

import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as ws

NAME = "moeprune"
# Setting or result -> how the axis of the parallel coordinates is called.
CHOICES = {
    "cfg.ratio": "ratio",
    "cfg.choices.method": "method",
    "cfg.choices.scorer": "scorer",
    "cfg.choices.allocator": "allocator",
    "cfg.choices.recovery": "recovery",
    "cfg.choices.quantizer": "quantizer",
}
RESULTS = {
    "final/compression": "times smaller",
    "final/perplexity_increase": "increase of perplexity",
    "final/mean_perplexity": "perplexity",
}
HEAT_MAPS = {
    "plots/kept_channels": "Kept channels by layer and expert",
    "plots/kept_widths": "Widths and coverage by layer",
    "plots/score_concentration": "Concentration of the scores by layer",
    "plots/router_entropy": "Router entropy by layer",
}
# Green where little was lost, red where much was.
LITTLE_LOST, MUCH_LOST = "#009E73", "#D55E00"


def workspace(entity: str, project: str) -> ws.Workspace:
    """The workspace, not yet saved; nothing is sent."""
    return ws.Workspace(
        name=NAME,
        entity=entity,
        project=project,
        sections=[
            ws.Section(name="Front: perplexity against bytes", panels=_front(), is_open=True),
            ws.Section(name="Choices and results", panels=_choices(), is_open=True),
            ws.Section(name="Layers and experts", panels=_heat_maps(), is_open=True),
            ws.Section(name="Recovery", panels=_losses(), is_open=True),
            ws.Section(name="Where the time went", panels=_times()),
        ],
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Metric("Group")], order=[ws.Ordering(ws.Summary("final/mean_perplexity"), ascending=True)]
        ),
    )


def _front() -> list[panels.ScatterPlot]:
    """The line joins the least perplexity so far from left to right, which is the front."""
    return [
        panels.ScatterPlot(
            title=title,
            x=panels.SummaryMetric(size),
            y=panels.SummaryMetric("final/mean_perplexity"),
            z=panels.Config("cfg.ratio"),
            log_x=True,
            log_y=True,
            running_ymin=True,
            layout=panels.Layout(x=column * 12, y=0, w=12, h=10),
        )
        for column, (size, title) in enumerate(
            {
                "final/bytes/with_overhead": "Perplexity against bytes, scales included",
                "final/parameters/active": "Perplexity against parameters of a token",
            }.items()
        )
    ]


def _choices() -> list[object]:
    axes = [(panels.Config(name), label) for name, label in CHOICES.items()]
    axes += [(panels.SummaryMetric(name), label) for name, label in RESULTS.items()]
    gradient = [panels.GradientPoint(color=LITTLE_LOST, offset=0), panels.GradientPoint(color=MUCH_LOST, offset=100)]
    return [
        panels.ParallelCoordinatesPlot(
            title="From choices to perplexity",
            columns=[panels.ParallelCoordinatesPlotColumn(metric, display_name=label) for metric, label in axes],
            gradient=gradient,
            layout=panels.Layout(x=0, y=0, w=24, h=10),
        ),
        panels.ParameterImportancePlot(
            with_respect_to="final/mean_perplexity", layout=panels.Layout(x=0, y=10, w=24, h=8)
        ),
    ]


def _heat_maps() -> list[panels.MediaBrowser]:
    return [
        panels.MediaBrowser(
            title=title, media_keys=[key], num_columns=2, layout=panels.Layout(x=0, y=10 * row, w=24, h=10)
        )
        for row, (key, title) in enumerate(HEAT_MAPS.items())
    ]


def _losses() -> list[panels.LinePlot]:
    return [
        panels.LinePlot(
            title=title, x="recovery/step", y=[f"recovery/{name}"], layout=panels.Layout(x=column * 12, y=0, w=12, h=8)
        )
        for column, (name, title) in enumerate(
            {"loss": "Training loss", "validation_loss": "Loss on held-out windows"}.items()
        )
    ]


def _times() -> list[panels.BarPlot]:
    return [
        panels.BarPlot(title="Seconds, computed or saved by the cache", metrics=[f"stages/{name}_seconds"])
        for name in ("computed", "reused")
    ]


def main(words: list[str]) -> int:
    """Save the workspace for ENTITY/PROJECT; 2 where that is not what was given."""
    entity, slash, project = (words[0] if len(words) == 1 else "").partition("/")
    if not (entity and slash and project):
        print("usage: python sweeps/workspace.py ENTITY/PROJECT", file=sys.stderr)
        return 2
    print(workspace(entity, project).save().url)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
