"""The tables of pocket's model card, from the files its training and measuring wrote."""

# metric: (what it says, how it is shown); shares of 1 become percent
METRICS = {
    "objects": ("objects of the prompt present, with colour and shape", "share"),
    "objects_held_out": ("the same, of colour-shape pairs never trained on", "share"),
    "relations": ("relations right", "share"),
    "relations_held_out": ("relations right, in scenes with a pair never trained on", "share"),
    "prompts_all_right": ("prompts with every object and relation right", "share"),
    "faultless": ("the same, and no other object in the picture", "share"),
    "faultless_held_out": ("the same, of prompts with a pair never trained on", "share"),
    "sky": ("sky right, where the prompt names it", "share"),
    "finish": ("finish of present objects right, where the prompt names it", "share"),
    "objects_shuffled": ("control: objects, against another picture's prompt", "share"),
    "relations_shuffled": ("control: relations, against another picture's prompt", "share"),
    "oracle_objects": ("oracle on renders: objects", "share"),
    "oracle_relations": ("oracle on renders: relations", "share"),
    "oracle_finish": ("oracle on renders: finish", "share"),
    "oracle_sky": ("oracle on renders: sky", "share"),
    "oracle_objects_shuffled": ("control: oracle's objects, against another render", "share"),
    "oracle_relations_shuffled": ("control: oracle's relations, against another render", "share"),
    "vae_psnr_db": ("VAE reconstruction of renders", "dB"),
    "vae_oracle_objects": ("objects the oracle still reads after the VAE", "share"),
    "tiny_vae_psnr_db": ("tiny VAE against the full decoder", "dB"),
    "tiny_vae_oracle_objects": ("objects the oracle still reads after the tiny VAE", "share"),
}
SECONDS = {
    "unet_guided_call_s": "one guided UNet call (batch 2)",
    "vae_decode_s": "VAE decode",
    "tiny_vae_decode_s": "tiny VAE decode",
}


def _machine(result):
    environment = result["environment"]
    return f"{environment['gpu'] or environment['cpu']}, torch {environment['torch']}, diffusers {environment['diffusers']}"


def _shown(value, unit):
    return f"{100 * value:.1f} %" if unit == "share" else f"{value:.1f} {unit}"


def _card(result):
    settings = result["settings"]
    lines = ["| | value | 95 % interval | n |", "| --- | ---: | ---: | ---: |"]
    for name, (says, unit) in METRICS.items():
        m = result["metrics"][name]
        interval = f"{_shown(m['low'], unit)} to {_shown(m['high'], unit)}"
        lines.append(f"| {says} | {_shown(m['value'], unit)} | {interval} | {m['n']:,} |")
    sweep = "; ".join(
        f"{row['guidance_scale']:g}: "
        + ", ".join(_shown(row[name]["value"], "share") for name in ("objects", "relations", "faultless"))
        for row in result["guidance_sweep"]
    )
    return (
        f"{settings['steps']} steps of {settings['scheduler']}, guidance {settings['guidance_scale']}, {settings['dtype']}, "
        f"on {_machine(result)}.\n\n"
        + "\n".join(lines)
        + f"\n\nObjects, relations and faultless pictures by guidance scale, on validation prompts: {sweep}. Recommended is the lowest "
        "scale whose faultless pictures are within the best's interval."
    )


def _speed(result):
    metrics = result["metrics"]
    lines = [
        f"On {_machine(result)}, {result['settings']['threads']} threads, fp32, median of {result['settings']['runs']} calls:",
        "",
    ]
    lines += [f"- {says}: {1000 * metrics[name]['median']:.0f} ms" for name, says in SECONDS.items()]
    lines.append(f"- the tiny VAE decodes {metrics['tiny_vae_speedup']:.1f} times faster than the full one")
    lines.append(
        f"- on disk: the pipeline {metrics['pipeline_mib']:.1f} MiB, the oracle {metrics['oracle_mib']:.1f} MiB"
    )
    return "\n".join(lines)


def _training(result):
    lines = [
        "| stage | parameters | steps | batch | images a second | minutes |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, stage in result["stages"].items():
        last = stage["points"][-1]
        lines.append(
            f"| {name} | {stage['parameters'] / 1e6:.1f} M | {last['step']:,} | {stage['settings']['batch']} "
            f"| {last['images_per_s']:,.0f} | {stage['seconds'] / 60:.1f} |"
        )
    total = sum(stage["seconds"] for stage in result["stages"].values()) / 60
    return f"On {_machine(result)}: {total:.0f} minutes of training in all, compiling included.\n\n" + "\n".join(lines)


BLOCKS = {"card": _card, "speed": _speed, "training": _training}
