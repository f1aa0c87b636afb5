//! `heads.json` and plans.

use super::{Input, Kind, Reader};
use crate::error::Result;
use crate::report::HeadMap;
use crate::report::format::count;
use model::HeadPlan;
use model::plan::PLAN_VERSION;
use surgery::HeadsReport;

impl Reader {
    pub(super) fn heads(&mut self, input: &Input<'_>) -> Result<Vec<(String, String)>> {
        let heads = HeadsReport::read(input.path).map_err(|e| input.unreadable(e))?;
        let facts = vec![
            ("tokens".into(), count(heads.tokens)),
            ("context".into(), count(heads.context)),
            ("data SHA-256".into(), heads.data_sha256.clone()),
            ("seed".into(), heads.seed.to_string()),
        ];
        // Plans that came before it find their statistics.
        let model = heads.model.clone();
        match self.report.maps.iter_mut().find(|map| map.model == model && map.heads.is_none()) {
            Some(map) => (map.title, map.heads) = (input.path.display().to_string(), Some(heads)),
            None => {
                let title = input.path.display().to_string();
                let sibling = self.report.maps.iter().find(|map| map.model == model);
                let plans = sibling.map(|map| map.plans.clone()).unwrap_or_default();
                self.report.maps.push(HeadMap { title, model, heads: Some(heads), plans });
            }
        }
        Ok(facts)
    }

    pub(super) fn plan(&mut self, input: &Input<'_>) -> Result<Vec<(String, String)>> {
        let plan: HeadPlan = input.parse(Kind::Plan)?;
        check(&plan).map_err(|reason| input.bad(reason))?;
        let mut facts = vec![
            ("groups converted".into(), format!("{} of {}", plan.converted(), plan.total())),
            ("beta".into(), plan.beta.to_string()),
        ];
        facts.extend(plan.criterion.as_ref().map(|c| ("criterion".into(), c.name.clone())));
        facts.extend(plan.mixer.as_ref().map(|m| ("replacement".into(), m.to_string())));
        let name = input.path.display().to_string();
        let maps = &mut self.report.maps;
        if !maps.iter().any(|map| map.model == plan.model) {
            maps.push(HeadMap {
                title: name.clone(),
                model: plan.model.clone(),
                heads: None,
                plans: Vec::new(),
            });
        }
        for map in maps.iter_mut().filter(|map| map.model == plan.model) {
            map.plans.push((name.clone(), plan.clone()));
        }
        Ok(facts)
    }
}

/// A plan agrees with itself: whether it fits a model is for that model to say.
fn check(plan: &HeadPlan) -> std::result::Result<(), String> {
    let model = &plan.model;
    if plan.version != PLAN_VERSION {
        return Err(format!("plan version {}, expected {PLAN_VERSION}", plan.version));
    }
    if plan.layers.len() != model.layers {
        return Err(format!("the plan lists {} layers, its model has {}", plan.layers.len(), model.layers));
    }
    if plan.layers.is_empty() || model.heads == 0 || !model.heads.is_multiple_of(model.kv_heads) {
        return Err(format!(
            "the plan's model has {} layers of {} heads in {} groups",
            model.layers, model.heads, model.kv_heads
        ));
    }
    // A group takes bytes of the file, heads do not.
    if model.heads / model.kv_heads > 1024 {
        return Err(format!("the plan's model has {} heads in each group", model.heads / model.kv_heads));
    }
    if let Some((layer, found)) =
        plan.layers.iter().map(|l| l.groups.len()).enumerate().find(|(_, n)| *n != model.kv_heads)
    {
        return Err(format!(
            "layer {layer} of the plan lists {found} groups, its model has {}",
            model.kv_heads
        ));
    }
    Ok(())
}
