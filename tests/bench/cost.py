"What a better score costs: each network after three lengths of training, on small simulated data, beside what costs next to nothing."
import tempfile
import time
from importlib import import_module
from pathlib import Path

from geoforecast.learn.callbacks import read_metrics
from geoforecast.learn.launch import launch


def fire_data(folder):
    from geoforecast.fire.simulate import simulate_fires
    simulate_fires(folder/"fires", 12, shape=(12, 64, 64))
    return folder/"fires"


def rain_data(folder):
    from geoforecast.precipitation.simulate import simulate_atmosphere
    simulate_atmosphere(folder/"rain.nc", n_times=2000)
    return folder/"rain.nc"


def scene_data(folder): return import_module("geoforecast.segmentation.simulate").simulate_dataset(folder/"scenes", 8, size=384)


def scored(task, run, key):
    "Score what needs no network on the validation; of land cover, that all is the class that covers most."
    rows = [r for r in import_module(f"geoforecast.{task}.evaluation").report(run, maps=1) if r["split"] == "val"]
    if task != "segmentation": return {r["model"]: r[key] for r in rows if r["model"] != type(run.forecaster.network).__name__ and key in r and not {"fire", "year", "day"} & set(r)}
    shares = [r["share"] for r in rows if "class" in r and r["trained"] and "iou" in r]
    return {"majority": max(shares)/len(shares)}


TASKS = dict(
    precipitation=(rain_data, ("unet", "simvp", "convlstm_unet"), dict(validation_frequency=32), "max_epochs", (1, 4, 16), "rmse", "RMSE (mm)"),
    segmentation=(scene_data, ("supervised_small", "consistency_small", "s4gan_small"), dict(eval_every=20, save_latest_every=20), "max_steps", (20, 60, 180), "miou", "mean IoU"),
    fire=(fire_data, ("unet", "utae_small", "convlstm", "guillermo_v2_small"), dict(crop_size=32, batch_size=8, samples_per_epoch=128), "max_epochs", (1, 4, 16), "ap", "average precision"))


def trained(config, data, folder, options):
    "Train, and return the run and the processor minutes that it took."
    run, start = launch(config, data_dir=str(data), output_dir=str(folder), **options), time.process_time()
    run.fit()
    return run, (time.process_time() - start)/60


def curve(task):
    "Train each network of a task for each length."
    make, models, options, budget, lengths, key, label = TASKS[task]
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
        free = scored(task, run, key)
    return dict(curve=f"cost of {task}", title=f"{task}: what a score costs", lines=lines, baselines=free, x_label="processor minutes", y_label=f"{label} of the validation")


def measure():
    for task in TASKS: yield curve(task)
