"""`python -m fluxflow_train.report`: finished runs side by side (`runs=[A,B]`), or a study (`study=DIR`)."""

from omegaconf import DictConfig

from fluxflow_train.cli import command


@command("report")
def main(cfg: DictConfig) -> None:
    if cfg.study is not None:
        from pathlib import Path

        from fluxflow_train.studying import report

        report(Path(cfg.study).expanduser(), cfg.publish)
        return
    from fluxflow_train.comparing import compare

    compare(cfg)


if __name__ == "__main__":
    main()
