"""The subcommands of `mobilemoe`, a file each: the dataclass of its arguments and the function that does the work.

This table is the only list of them. A command's file imports torch, Ray and other slow modules inside its functions,
after its input has been accepted, so that help and refusals come at once.
"""

from pipelines.commands import (
    data,
    evaluate,
    export,
    fetch,
    import_model,
    info,
    plan,
    profile,
    publish,
    recipes,
    report,
    run,
    scaling_law,
    serve,
    status,
)
from pipelines.commands.command import Command

COMMANDS: dict[str, Command] = {
    "run": Command(run.Run, run.run, run.parse),
    "data": Command(data.Data, data.make_data, data.parse),
    "plan": Command(plan.Plan, plan.show_plan, plan.parse),
    "status": Command(status.Status, status.show_status),
    "report": Command(report.Report, report.rewrite_report),
    "recipes": Command(recipes.Recipes, recipes.list_recipes),
    "info": Command(info.Info, info.show_info, info.parse),
    "scaling-law": Command(scaling_law.ScalingLaw, scaling_law.run, scaling_law.parse),
    "eval": Command(evaluate.Eval, evaluate.evaluate),
    "export": Command(export.Export, export.export),
    "import": Command(import_model.Import, import_model.import_model),
    "profile": Command(profile.Profile, profile.profile),
    "serve": Command(serve.Serve, serve.serve),
    "publish": Command(publish.Publish, publish.publish),
    "fetch": Command(fetch.Fetch, fetch.fetch),
}
