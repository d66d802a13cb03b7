"What a better score costs: each network after three lengths of training, on small simulated data, beside what costs nothing."
import tempfile
import time
from importlib import import_module
from pathlib import Path

from geoforecast.learn.callbacks import read_metrics
from geoforecast.learn.launch import launch


def fire_data(folder):
    from geoforecast.fire.simulate import simulate_fires
    simulate_fires(folder, 8, shape=(10, 80, 80))
    return folder


def rain_data(folder):
    from geoforecast.precipitation.simulate import simulate_atmosphere
    simulate_atmosphere(folder/"rain.nc", n_times=1000)
    return folder/"rain.nc"


def scene_data(folder): return import_module("geoforecast.segmentation.simulate").simulate_dataset(folder/"scenes", 8, size=384)


TASKS = dict(
    precipitation=(rain_data, ("unet", "simvp", "convlstm_unet"), dict(validation_frequency=8), "max_epochs", (1, 3, 9), "rmse", "RMSE (mm)"),
    segmentation=(scene_data, ("supervised_small", "consistency_small", "s4gan_small"), dict(eval_every=20, save_latest_every=20), "max_steps", (20, 60, 180), "miou", "mean IoU"),
    fire=(fire_data, ("logistic", "unet", "utae_small", "convlstm", "guillermo_v2_small"), dict(crop_size=64, samples_per_epoch=48), "max_epochs", (1, 3, 9), "ap", "average precision"))


def trained(config, data, folder, options):
    "Train, and return the run and the processor minutes that it took."
    run, start = launch(config, data_dir=str(data), output_dir=str(folder), **options), time.process_time()
    run.fit()
    return run, (time.process_time() - start)/60


def measure():
    for task, (make, models, options, budget, lengths, key, label) in TASKS.items():
        with tempfile.TemporaryDirectory() as name:
            folder, lines = Path(name), {}
            data = make(folder)
            for model in models:
                minutes, scores = [], []
                for n in lengths:
                    run, spent = trained(f"{task}/{model}", data, folder/"runs"/f"{model}_{n}", options | {budget: n})
                    minutes.append(spent)
                    scores.append([r[f"val/{key}"] for r in read_metrics(run.folder/"metrics.csv") if f"val/{key}" in r][-1])
                lines[model] = dict(x=minutes, y=scores)
            rows = import_module(f"geoforecast.{task}.evaluation").report(run)
            free = {r["model"]: r[key] for r in rows if r["split"] == "val" and r["model"] != type(run.forecaster.network).__name__ and r.get(key) is not None}
        yield dict(curve=f"cost of {task}", title=f"{task}: what a score costs", lines=lines, baselines=free, x_label="processor minutes", y_label=f"{label} of the validation")
