"""Answers to the exercises of 07_tiny_vae, and mistakes that are often made."""


def decode(vae, latents):
    return vae.decode(latents / vae.config.scaling_factor).sample


def speedup(share, factor):
    return 1 / (1 - share + share / factor)


# 7.1: one rule for both, since each VAE brings its own scaling factor: 1 for the tiny one.
# 7.2: Amdahl's law. Of a time of 1, `1 - share` stays and `share` shrinks to `share / factor`.
ANSWERS = {"07.1": decode, "07.2": speedup}

MISTAKES = {
    "07.1": [
        lambda vae, latents: vae.decode(latents).sample,  # right for the tiny one alone
        lambda vae, latents: vae.decode(latents / 0.4252317948540138).sample,  # right for the full one alone
        lambda vae, latents: vae.decode(latents * vae.config.scaling_factor).sample,  # the wrong way round
        lambda vae, latents: vae.decode(latents / vae.config.scaling_factor),  # an output, not its pixels
    ],
    "07.2": [
        lambda share, factor: 1 / (1 - share),  # the most it can be, with a factor without end
        lambda share, factor: share * factor,
        lambda share, factor: 1 - share + share / factor,  # the time left, not the speed-up
        1.05,
    ],
}
