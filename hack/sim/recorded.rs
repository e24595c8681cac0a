//! Recorded traces in the form of the Azure Functions trace of 2019: calls per minute, one function a row.
//!
//! <https://github.com/Azure/AzurePublicDataset/blob/master/AzureFunctionsDataset2019.md>. Columns are known by their
//! names: `HashFunction`, and one a minute (`1` or `minute_1`); of the run times, `HashFunction` and `Average`
//! (milliseconds). The trace tells no moments within a minute, so they are drawn evenly.

use std::collections::HashMap;

use anyhow::Context as _;

use crate::engine::Trace;
use crate::synthetic::Dice;

/// Replicas of one function at most: enough for the busiest of those traces.
const MAX: usize = 200;

/// Reads a trace, and the run times that belong to it.
pub(crate) fn parse(invocations: &str, durations: Option<&str>) -> anyhow::Result<Trace> {
    let averages = durations.map(averages).transpose()?.unwrap_or_default();
    let mut lines = invocations.lines();
    let header: Vec<&str> = lines.next().context("the trace is empty")?.split(',').collect();
    let name = column(&header, "HashFunction")?;
    let is_minute = |column: &str| column.trim_start_matches("minute_").parse::<u32>().is_ok();
    let first = header.iter().position(|column| is_minute(column)).context("the trace has no minutes")?;
    let mut dice = Dice::new(3);
    let mut functions = Vec::new();
    for line in lines.filter(|line| !line.is_empty()) {
        let row: Vec<&str> = line.split(',').collect();
        let known = row.get(name).and_then(|name| averages.get(*name)).copied();
        let average = known.unwrap_or_else(|| dice.execution());
        let mut calls = Vec::new();
        for (minute, count) in (0_u32..).zip(&row[first..]) {
            let count: f64 = count.parse().with_context(|| format!("{count:?} is not a number of calls"))?;
            let mut left = count;
            while left >= 1.0 {
                let at = (f64::from(minute) + dice.unit()) * 60.0;
                calls.push(dice.call(at, average));
                left -= 1.0;
            }
        }
        calls.sort_by_key(|call| call.at);
        functions.push(calls);
    }
    let length = (header.len() - first) as u64 * 60_000_000;
    let about = "Calls per minute as recorded; moments within a minute are drawn.".to_owned();
    Ok(Trace { name: "Recorded".to_owned(), about, length, max: MAX, functions })
}

/// Average run times in seconds.
fn averages(durations: &str) -> anyhow::Result<HashMap<&str, f64>> {
    let mut lines = durations.lines();
    let header: Vec<&str> = lines.next().context("the run times are empty")?.split(',').collect();
    let (name, average) = (column(&header, "HashFunction")?, column(&header, "Average")?);
    let row = |line: &'_ str| -> Option<f64> { line.split(',').nth(average)?.parse().ok() };
    Ok(lines.filter_map(|line| Some((line.split(',').nth(name)?, row(line)? / 1000.0))).collect())
}

fn column(header: &[&str], name: &str) -> anyhow::Result<usize> {
    header.iter().position(|column| *column == name).with_context(|| format!("there is no column {name}"))
}
