//! What recipes, budgets and work folders accept.

use super::*;

#[test]
fn a_work_folder_is_for_one_run() {
    let fixture = Fixture::new();
    let other = Fixture { train: random_documents(3, 400, 64, 9), ..Fixture::new() };
    let (recipe, budget) = &cases()[0];
    let work = fixture.work("work");
    let it = fixture.run(recipe, budget, &work);
    let record = Record::open(&it, "tiny", &["a".into()], false).unwrap();
    assert_eq!(Record::open(&it, "named differently", &["b".into()], true).unwrap(), record);
    assert!(Record::open(&it, "tiny", &[], false).unwrap_err().to_string().contains("--resume"));

    let changed = |change: &dyn Fn(&mut Recipe)| {
        let mut recipe = recipe.clone();
        change(&mut recipe);
        recipe
    };
    let mut base = fixture.base.clone();
    let id = base.params.id("model.norm.weight").unwrap();
    base.params.data_mut(id)[3] += 1.0;
    let recipes = [
        (changed(&|r| r.seeds = Seeds::new(6)), "recipe.seeds.main` 5, this run has 6"),
        (changed(&|r| r.heal.tokens = 128), "recipe.heal.tokens` 256, this run has 128"),
        (changed(&|r| r.heal.lr = 3e-4), "recipe.heal.lr` 0.0005, this run has 0.0003"),
        (changed(&|r| r.criterion = "random"), "recipe.criterion` \"mixer-fisher\", this run has \"random\""),
    ];
    let budget_changed = Budget::Beta(0.75);
    let runs = recipes.iter().map(|(recipe, needle)| (Run { recipe, ..it }, *needle)).chain([
        (Run { budget: &budget_changed, ..it }, "budget.beta` 0.5, this run has 0.75"),
        (Run { base: &base, ..it }, "base_sha256"),
        (Run { train: &other.train, ..it }, "train_sha256"),
        (Run { heldout: &other.train, ..it }, "heldout_sha256"),
    ]);
    for (run, needle) in runs {
        let error = Record::open(&run, "tiny", &[], true).unwrap_err().to_string();
        assert!(error.contains(needle) && error.contains("hint: "), "{needle}: {error}");
    }

    for content in ["{}", "no", r#"{"version": 2}"#] {
        std::fs::write(work.join("recipe.json"), content).unwrap();
        let error = Record::open(&it, "tiny", &[], true).unwrap_err().to_string();
        assert!(error.contains("holds no run") && error.contains("hint: "), "{error}");
    }
}

#[test]
fn tokens_scale_in_proportion() {
    assert_eq!((DEFAULT.tokens(), PAPER.tokens()), (1_294_336, 1_294_336));
    let scaled = DEFAULT.scaled(129_433_600).unwrap();
    assert_eq!((scaled.align.unwrap().tokens, scaled.heal.tokens), (104_857_600, 24_576_000));
    let same = DEFAULT.scaled(1_294_336).unwrap();
    assert_eq!(same, DEFAULT);
    assert_eq!(PAPER.scaled(10_000).unwrap().heal.tokens, 10_000);
    let huge = DEFAULT.scaled(u64::MAX).unwrap();
    assert_eq!(huge.tokens(), u64::MAX);
    assert_eq!(DEFAULT.scaled(5388).unwrap().heal.tokens, 1024);
    let error = DEFAULT.scaled(5387).unwrap_err().to_string();
    assert!(error.contains("heal") && error.contains("1024") && error.contains("hint: "), "{error}");
    assert!(DEFAULT.scaled(900).unwrap_err().to_string().contains("align"));
}

#[test]
fn the_recipes_keep_the_defaults_of_their_stages() {
    let align = AlignOptions { tokens: 1_048_576, ..Default::default() };
    assert_eq!(format!("{:?}", ALIGN.options()), format!("{align:?}"));
    let heal = HealOptions { tokens: 245_760, batch: 1, lr: 5e-4, ..Default::default() };
    assert_eq!(format!("{:?}", DEFAULT.heal.options()), format!("{heal:?}"));
    let heal = HealOptions {
        stage: Stage::Continue,
        trainable: Trainable::All,
        tokens: 1_294_336,
        ..Default::default()
    };
    assert_eq!(format!("{:?}", PAPER.heal.options()), format!("{heal:?}"));
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let fixture = Fixture::new();
    let config = &fixture.base.config;
    let fitted = DEFAULT.fitted(config.max_context);
    assert!(DEFAULT.check(config).unwrap_err().to_string().contains("the model's 256"));
    fitted.check(config).unwrap();
    let contexts = fitted.align.map(|a| (a.context, a.measure_context)).unwrap();
    assert_eq!((fitted.analyze.context, contexts, fitted.heal.context), (256, (256, 256), 256));
    let unaligned = Recipe { align: None, ..fitted.clone() };
    assert!(unaligned.check(config).unwrap_err().to_string().contains("mixer-fisher"));
    let sinks = Recipe { mixer: Mixer { window: 0, ..fitted.mixer }, ..fitted.clone() };
    assert!(sinks.check(config).is_err());
    let seen = Recipe { mixer: Mixer { window: 255, ..fitted.mixer }, ..fitted.clone() };
    assert!(seen.check(config).unwrap_err().to_string().contains("nothing to learn"));
    Recipe { mixer: Mixer { window: 254, ..fitted.mixer }, ..fitted.clone() }.check(config).unwrap();

    let (one, several) = (Budget::Beta, |betas: &[f64]| Budget::Elastic(betas.to_vec()));
    for budget in [one(0.25), one(1.0), several(&[0.5]), several(&[1.0, 0.25])] {
        budget.check(config).unwrap();
    }
    for (budget, needle) in [
        (one(-0.1), "between 0 and 1"),
        (one(f64::NAN), "between 0 and 1"),
        (one(1.5), "between 0 and 1"),
        (one(0.1), "no group"),
        (several(&[0.0, 0.5]), "no group"),
        (several(&[0.5, 0.5]), "the same groups"),
        (several(&[0.5, f64::NAN]), "between 0 and 1"),
        (several(&[]), "at least one"),
    ] {
        let work = fixture.work("work");
        std::fs::create_dir(&work).unwrap();
        let error = run(&fixture.run(&fitted, &budget, &work), None, &mut Silent).err().unwrap().to_string();
        assert!(error.contains(needle), "{budget:?}: {error}");
        // An empty folder, so this removes it.
        std::fs::remove_dir(&work).unwrap();
    }
}
