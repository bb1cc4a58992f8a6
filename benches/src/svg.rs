//! Plain SVG: grouped bars and lines.

use std::fmt::Write as _;

/// Colours that also differ for the colour-blind (Okabe and Ito).
const COLOURS: [&str; 5] = ["#999999", "#0072b2", "#e69f00", "#f0e442", "#cc79a7"];
const WIDTH: f64 = 860.0;
const LEFT: f64 = 290.0;
const RIGHT: f64 = 120.0;
const BAR: f64 = 13.0;
const GAP: f64 = 12.0;
const TOP: f64 = 64.0;

/// One bar, with its quartiles as a whisker.
pub struct Bar {
    pub series: usize,
    pub value: f64,
    pub low: f64,
    pub high: f64,
    pub label: String,
}

/// The bars of one row.
pub struct Group {
    pub title: String,
    pub bars: Vec<Bar>,
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn colour(series: usize) -> &'static str {
    COLOURS.get(series % COLOURS.len()).copied().unwrap_or("#000000")
}

fn begin(height: f64, title: &str) -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    text(&mut svg, 12.0, 20.0, "start\" font-size=\"15", title);
    svg
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, content: &str) {
    let content = escape(content);
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{content}</text>");
}

fn line(svg: &mut String, from: (f64, f64), to: (f64, f64), style: &str) {
    let ((x1, y1), (x2, y2)) = (from, to);
    let _ = writeln!(svg, "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" {style}/>");
}

fn legend(svg: &mut String, names: &[&str], y: f64) {
    let mut x = 12.0;
    for (series, name) in names.iter().enumerate() {
        let fill = colour(series);
        let _ = writeln!(
            svg,
            "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"10\" height=\"10\" fill=\"{fill}\"/>",
            y - 9.0
        );
        text(svg, x + 14.0, y, "start", name);
        x += 34.0 + 6.5 * name.len() as f64;
    }
}

/// Horizontal bars; the line at `mark` is what they are compared with.
pub fn bars(title: &str, names: &[&str], groups: &[Group], mark: f64) -> String {
    let rows: f64 = groups.iter().map(|group| group.bars.len() as f64 * BAR + GAP).sum();
    let height = TOP + rows + 34.0;
    let most = groups.iter().flat_map(|group| &group.bars).map(|bar| bar.value).fold(mark * 1.1, f64::max);
    let scale = (WIDTH - LEFT - RIGHT) / most;
    let mut svg = begin(height, title);
    legend(&mut svg, names, 42.0);
    let bottom = TOP + rows;
    let step = if most > 5.0 {
        1.0
    } else if most > 2.5 {
        0.5
    } else {
        0.2
    };
    let mut tick = 0.0;
    while tick <= most {
        let x = LEFT + tick * scale;
        line(&mut svg, (x, TOP - 6.0), (x, bottom), "stroke=\"#dddddd\"");
        text(&mut svg, x, bottom + 14.0, "middle", &format!("{tick:.1}"));
        tick += step;
    }
    let mut y = TOP;
    for group in groups {
        let middle = y + group.bars.len() as f64 * BAR / 2.0 + 4.0;
        text(&mut svg, LEFT - 8.0, middle, "end", &group.title);
        for bar in &group.bars {
            let width = (bar.value * scale).max(0.5);
            let fill = colour(bar.series);
            let thick = BAR - 2.0;
            let _ = writeln!(
                svg,
                "<rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{thick}\" fill=\"{fill}\"/>"
            );
            let centre = y + thick / 2.0;
            let (low, high) = (LEFT + bar.low * scale, LEFT + bar.high.min(most) * scale);
            line(&mut svg, (low, centre), (high, centre), "stroke=\"#000000\"");
            text(&mut svg, (LEFT + width).max(high) + 5.0, y + BAR - 4.0, "start", &bar.label);
            y += BAR;
        }
        y += GAP;
    }
    let x = LEFT + mark * scale;
    line(&mut svg, (x, TOP - 6.0), (x, bottom), "stroke=\"#d55e00\" stroke-dasharray=\"4 3\"");
    svg.push_str("</svg>\n");
    svg
}

/// A series of points.
pub struct Series {
    pub name: String,
    pub colour: usize,
    pub points: Vec<(f64, f64)>,
}

/// One panel of lines from zero.
pub struct Panel {
    pub title: String,
    pub series: Vec<Series>,
}

/// Panels of lines, one below the other.
pub fn lines(title: &str, panels: &[Panel], x_title: &str) -> String {
    const PANEL: f64 = 190.0;
    const MARGIN: f64 = 70.0;
    let mut svg = begin(40.0 + panels.len() as f64 * PANEL + 20.0, title);
    for (number, panel) in panels.iter().enumerate() {
        let top = 60.0 + number as f64 * PANEL;
        let (height, width) = (PANEL - 60.0, WIDTH - 2.0 * MARGIN);
        let points = || panel.series.iter().flat_map(|series| &series.points);
        let most_x = points().map(|point| point.0).fold(1.0, f64::max);
        let most_y = points().map(|point| point.1).fold(1.0, f64::max) * 1.1;
        let place = |point: &(f64, f64)| {
            (MARGIN + point.0 / most_x * width, top + height - point.1 / most_y * height)
        };
        text(&mut svg, MARGIN, top - 8.0, "start", &panel.title);
        for part in 0..=4 {
            let share = f64::from(part) / 4.0;
            let y = top + height * (1.0 - share);
            line(&mut svg, (MARGIN, y), (MARGIN + width, y), "stroke=\"#dddddd\"");
            text(&mut svg, MARGIN - 6.0, y + 4.0, "end", &format!("{:.0}", most_y * share));
            let x = MARGIN + width * share;
            text(&mut svg, x, top + height + 14.0, "middle", &format!("{:.0}", most_x * share));
        }
        for series in &panel.series {
            let path: Vec<String> =
                series.points.iter().map(&place).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            let stroke = colour(series.colour);
            let _ = writeln!(
                svg,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{stroke}\" stroke-width=\"1.8\"/>",
                path.join(" ")
            );
            if let Some((x, y)) = series.points.last().map(&place) {
                text(&mut svg, x + 5.0, y + 4.0, "start", &series.name);
            }
        }
    }
    let y = 40.0 + panels.len() as f64 * PANEL + 10.0;
    text(&mut svg, WIDTH / 2.0, y, "middle", x_title);
    svg.push_str("</svg>\n");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn well_formed() {
        let bar = Bar { series: 1, value: 0.5, low: 0.4, high: 0.6, label: "a < b".into() };
        let svg = bars("t", &["native", "kso"], &[Group { title: "g".into(), bars: vec![bar] }], 1.0);
        assert!(svg.contains("a &lt; b") && svg.ends_with("</svg>\n"));
        let series = Series { name: "kso".into(), colour: 1, points: vec![(0.0, 1.0), (1.0, 2.0)] };
        let svg = lines("t", &[Panel { title: "p".into(), series: vec![series] }], "x");
        assert!(svg.contains("<polyline") && !svg.contains("NaN"));
    }
}
