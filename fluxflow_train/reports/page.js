// Read-out under the pointer: the nearest point of each line. The page is complete without it.
(() => {
  const tip = document.getElementById("tip");
  const short = (v) => (Math.abs(v) >= 1e4 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(4)));
  const element = (parent, name, attributes) => {
    const e = document.createElementNS(parent.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) e.setAttribute(key, value);
    parent.append(e);
  };
  const nearest = (xs, x) => xs.reduce((best, v, i) => (Math.abs(v - x) < Math.abs(xs[best] - x) ? i : best), 0);
  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const chart = JSON.parse(svg.dataset.chart);
    const [left, right, top, bottom] = chart.box;
    const scale = chart.log ? Math.log10 : (v) => v;
    const across = chart.log_x ? Math.log10 : (v) => v;
    const [x0, x1] = chart.x.map(across);
    const px = (v) => left + ((across(v) - x0) / (x1 - x0)) * (right - left);
    const py = (v) => bottom - ((scale(v) - scale(chart.y[0])) / (scale(chart.y[1]) - scale(chart.y[0]))) * (bottom - top);
    const cursor = svg.querySelector(".cursor");
    const hide = () => { cursor.replaceChildren(); tip.hidden = true; };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const unit = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      if (unit < left - 8 || unit > right + 8) return hide();
      const x = x0 + ((unit - left) / (right - left)) * (x1 - x0);
      const found = chart.series.map((s) => nearest(s.x.map(across), x));
      const anchor = chart.series[0].x[found[0]];
      cursor.replaceChildren();
      element(cursor, "path", { d: `M${px(anchor)} ${top}V${bottom}` });
      const lines = [`${short(anchor)} ${chart.x_label}`];
      chart.series.forEach((s, i) => {
        const j = found[i];
        element(cursor, "circle", { class: s.class ?? `c${i}`, cx: px(s.x[j]), cy: py(s.y[j]), r: 3.5 });
        lines.push(`${s.name}  ${short(s.y[j])} ${chart.unit}`);
      });
      tip.textContent = lines.join("\n");
      tip.hidden = false;
      tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8))}px`;
      tip.style.top = `${Math.max(8, event.clientY - tip.offsetHeight - 12)}px`;
    });
    svg.addEventListener("pointerleave", hide);
  }
})();
